"""Sums of bounded gradients, one gradient per example, without computing every gradient on its own."""

from fedpriv.tasks.per_example.clipped import MAX_FLOATS, SLACK, PerExample

__all__ = ["MAX_FLOATS", "SLACK", "PerExample"]
