"""Momentum² Teacher (arXiv 2101.07525): self-supervised pretraining of image encoders on Accelerate."""

__version__ = "0.1.0"
