"""The learning task: losses and metrics, models, local work."""
