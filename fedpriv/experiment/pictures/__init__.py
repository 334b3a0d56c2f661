"""Pictures of experiments and runs."""
