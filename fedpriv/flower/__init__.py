"""What lies between fedpriv and Flower: messages, bundles, and what Flower does not publish."""
