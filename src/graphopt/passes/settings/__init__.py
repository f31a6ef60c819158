"""Settings chosen at run time."""
