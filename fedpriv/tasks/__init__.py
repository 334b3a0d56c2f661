"""What is learned and how: losses and metrics, models, local work."""
