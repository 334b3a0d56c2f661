"""Commands `fedpriv deploy ...` of a deployment in operation."""
