"""Flower's client side: the mod that makes an app private, and the app that runs fedpriv's own experiments."""

from .mod import private_mod

__all__ = ["private_mod"]
