"""What the commands run, a folder each: the command, its parts and its figure."""
