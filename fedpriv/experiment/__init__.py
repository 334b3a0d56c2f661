"""An experiment: its config, its run and its records."""
