"""Launch checks, collective calls and signals."""
