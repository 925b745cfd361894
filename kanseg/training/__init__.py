"""Training: losses and optimizers by name, checkpoints that survive kills, and `fit`, the one loop."""
