"""Data sets, and how clients come to hold them."""
