"""Runs all stages in order and packages the result."""
