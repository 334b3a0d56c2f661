"""Deployments on real devices: the protocol, the devices' side, the setting up."""
