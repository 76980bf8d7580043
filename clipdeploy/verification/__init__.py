"""Compares artifacts with PyTorch: records, metrics, statistics of the drop, verdicts, reports."""
