"""Packages artifacts for production: a Triton model repository or a C++ program."""
