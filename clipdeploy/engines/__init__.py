"""Graph -> engine: which TensorRT, its options, the compile, the passport, what became of it."""
