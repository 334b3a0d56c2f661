"""Differentially private federated learning: simulate fast, deploy the same code, know the true epsilon."""

__version__ = "0.1.0"
