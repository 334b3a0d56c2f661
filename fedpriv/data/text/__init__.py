"""Texts as numbers of tokens."""
