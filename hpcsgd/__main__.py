"""`python -m hpcsgd`: the command line where its script is not installed."""

from hpcsgd.commands.cli import run

run()
