"""What the tests of deployments share."""

HOST = "fl.example.org"
"""Host name of the server in the deployments of tests."""
