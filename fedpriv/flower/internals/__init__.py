"""All that touches what Flower does not publish."""
