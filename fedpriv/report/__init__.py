"""Reports on finished runs: studies, their total privacy cost, and a page about them."""
