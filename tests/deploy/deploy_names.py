"""What the tests of deployments share."""

HOST = "fl.example.org"
"""What nodes call the server of a deployment that tests make."""
