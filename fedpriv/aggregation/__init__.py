"""Sums of messages."""
