"""All stages in order, then the package."""
