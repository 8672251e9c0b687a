"""What the commands run, each composing the rooms above."""
