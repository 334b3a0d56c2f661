"""The engine with Ray actors as workers."""
