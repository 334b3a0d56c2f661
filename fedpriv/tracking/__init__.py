"""Send a run's rows to experiment trackers."""
