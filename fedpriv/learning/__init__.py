"""What is learned, and how: data and who holds it, models, and local work."""
