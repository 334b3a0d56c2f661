"""Setting up a deployment: folders, keys, certificates, checks, and the processes of Flower."""
