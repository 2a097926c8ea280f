"""Loading, exporting and publishing encoders."""
