"""Exports PyTorch modules to checked ONNX graphs; reads, checks and changes such graphs."""
