"""A release under way: its verbs, what is decided of it, on what, and by whom."""
