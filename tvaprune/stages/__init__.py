"""Page one: each command in the order of the method. Nothing imports a stage but the command line."""
