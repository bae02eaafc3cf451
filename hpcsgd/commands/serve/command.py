"""`hpcsgd serve` on the command line."""

from __future__ import annotations

from hpcsgd.commands import signals
from hpcsgd.commands.options import command
from hpcsgd.commands.serve.options import ServeOptions


def _serve(options: ServeOptions) -> None:
    signals.defer_sigusr1()
    from hpcsgd.commands.serve.job import serve

    serve(options)
    signals.ignore_stops()


serve = command("serve", ServeOptions, _serve)
