"""`statistics`: what finite data determine, against the laws of theory."""
