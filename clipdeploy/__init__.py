"""CLIP-pretrained ViT classifiers, from a PyTorch checkpoint to a proven TensorRT engine."""

import os

__version__ = "0.1.0"

# PyTorch's OpenMP threads spin while they wait, and take the cores from whatever decodes images
# beside them. It is read once, when PyTorch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
