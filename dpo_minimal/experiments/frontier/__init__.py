"""`frontier`: every method beside the best possible, on worlds that are known exactly."""
