"""Data sets, and their distribution among clients."""
