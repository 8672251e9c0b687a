"""Is this function right? Checks that answer with the smallest counterexample and name known mistakes."""
