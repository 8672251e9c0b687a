"""`sentiment`: the paper's controlled experiment on film reviews."""
