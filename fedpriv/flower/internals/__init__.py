"""All code that uses Flower's private interfaces."""
