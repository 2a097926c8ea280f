"""kNN, linear probe, fine-tuning and embeddings."""
