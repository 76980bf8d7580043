"""CLIP-pretrained ViT classifiers, from a PyTorch checkpoint to a proven TensorRT engine."""

__version__ = "0.1.0"
