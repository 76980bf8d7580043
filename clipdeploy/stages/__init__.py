"""A stage a file: export -> calibrate -> quantise -> build -> verify.

Each function is one command's work: it looks whether the artifact is already there and made from
the same inputs with the same settings, makes it if not, and returns what it made.
"""
