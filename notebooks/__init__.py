"""The course: its notebooks, their sources, and what builds the one from the other."""
