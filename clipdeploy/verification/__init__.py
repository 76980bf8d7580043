"""Artifacts against PyTorch: figures, the statistics of the drop, the verdict, its reports."""
