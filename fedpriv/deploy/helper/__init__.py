"""A helper of secure aggregation as a node of a deployment: its folder, and its answers to the server."""
