"""The command line: a file per command, each of them thin."""
