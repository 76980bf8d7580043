"""Errors, files, passports, progress and display: what every package uses."""
