"""A page to play with: what it shows is computed here, beforehand."""
