"""Setup of a deployment: folders, keys, certificates, checks, and Flower's processes."""
