"""What a run leaves: results.json, tables, pictures."""
