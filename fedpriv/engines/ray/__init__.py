"""The engine whose workers are Ray's actors."""
