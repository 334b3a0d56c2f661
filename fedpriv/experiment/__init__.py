"""An experiment: its config, its run, its records."""
