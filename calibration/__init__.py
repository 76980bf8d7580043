"""Activation ranges from images, and INT8 written into the graph."""
