"""The folder, checkpoints, resume and report of a run."""
