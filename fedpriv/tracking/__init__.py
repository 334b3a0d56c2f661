"""Sending a run's rows to trackers."""
