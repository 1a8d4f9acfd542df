"""Training: the loops, their jitted programs, environments, checkpoints and processes."""
