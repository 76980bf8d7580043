"""Compiles graphs to TensorRT engines, describes them in passports and inspects them."""
