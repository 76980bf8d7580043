"""``nn.Module`` to checked ONNX graphs, and the artifact types every later stage speaks."""
