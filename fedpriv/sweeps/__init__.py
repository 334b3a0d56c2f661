"""Sweeps: many trials of one experiment, in parallel."""
