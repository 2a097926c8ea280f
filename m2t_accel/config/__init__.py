"""Settings, recipes and the command line; imports no torch."""
