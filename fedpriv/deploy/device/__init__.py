"""A device's side of a deployment: its policy, ledger, memory and data."""
