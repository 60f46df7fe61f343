"""A pruned checkpoint in other formats, each verified against the checkpoint after it is written."""
