"""Evaluation of encoders: kNN, linear probe, fine-tuning and embeddings."""
