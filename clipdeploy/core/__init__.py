"""Errors, files, passports, progress and display, used by all other packages."""
