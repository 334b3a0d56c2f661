"""Deployments on real devices: the protocol, the devices' side and the setup."""
