"""Verifies artifacts against PyTorch: set-up, run, merge of shards."""
