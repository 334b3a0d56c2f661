"""Analyses as experiments: the table `[analysis]`, the answers of a run, and constants for a training."""
