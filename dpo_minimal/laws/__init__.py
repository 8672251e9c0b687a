"""What finite data determine, and the laws that samples follow. Imports the book and zoo/."""
