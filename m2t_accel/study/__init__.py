"""Studies: a grid of pretraining runs with an evaluation of each, and their results in small files."""
