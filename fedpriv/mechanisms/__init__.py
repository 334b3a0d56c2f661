"""Exact noise on a grid."""
