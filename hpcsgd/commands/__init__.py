"""The command line: one entry for each command of `hpcsgd --help`."""
