"""State of a deployment: the file that a running server writes, and the view that an administrator reads."""
