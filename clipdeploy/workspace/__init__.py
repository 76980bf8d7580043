"""The folder of a model's artifacts, and the checks of their passports."""
