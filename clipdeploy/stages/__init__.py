"""The stages of the pipeline, one module each: export, calibrate, quantise, build, verify.

Each stage is a function that does the work of one command.  It returns the existing artifact if
that was made from the same inputs with the same settings, and otherwise makes it.
"""
