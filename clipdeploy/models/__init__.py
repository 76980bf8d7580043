"""Find model cards, read checkpoints and build the PyTorch reference model."""
