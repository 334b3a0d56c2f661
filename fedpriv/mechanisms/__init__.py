"""Noise, exact on a grid."""
