"""Finds the Linears that cost accuracy, and chooses a precision for each Linear."""
