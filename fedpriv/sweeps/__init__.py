"""Sweeps: many trials of one experiment, side by side."""
