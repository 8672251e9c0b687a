"""What the course's notebooks import: checks, exercises and figures; and the grader. It is installed, too."""
