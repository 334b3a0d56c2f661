"""Reading finished runs: studies, what they spent, and a page about them."""
