"""Sums of bounded gradients, one gradient per example, without computing every gradient on its own."""

from fedpriv.tasks.per_example.clipped import MAX_FLOATS, SLACK, PerExample
from fedpriv.tasks.per_example.rows import cross_entropies

__all__ = ["MAX_FLOATS", "SLACK", "PerExample", "cross_entropies"]
