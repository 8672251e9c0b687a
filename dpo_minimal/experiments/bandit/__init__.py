"""`bandit`: train towards the closed-form optimum and prove that it is reached."""
