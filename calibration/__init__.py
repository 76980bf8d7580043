"""Collects activation statistics from images, and writes INT8 graphs."""
