"""Parts of strategies other than the method."""
