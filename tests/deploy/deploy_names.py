"""Constants shared by the tests of deployments."""

HOST = "fl.example.org"
"""Host name of the server in the deployments of tests."""
