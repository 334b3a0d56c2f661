"""Client side for Flower: the mod that makes an app private, and the app that runs fedpriv's experiments."""

from .mod import private_mod

__all__ = ["private_mod"]
