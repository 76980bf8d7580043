"""Finds a model's artifacts, checks their passports, and inspects single files."""
