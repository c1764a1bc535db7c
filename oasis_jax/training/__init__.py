"""Training: loss, optimizer, sharding, the compiled step, checkpoints, logs and the loop."""
