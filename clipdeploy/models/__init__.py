"""Model cards and checkpoints -> the PyTorch reference model."""
