"""Load, export and publish encoders."""
