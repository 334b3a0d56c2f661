"""Simulation of unmodified Flower apps: `fedpriv flower`."""
