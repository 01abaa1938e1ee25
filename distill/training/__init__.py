"""Training: the loop, its steps, the order of samples and batches, checkpoints and the log."""
