"""`hpcsgd train` on the command line."""

from __future__ import annotations

from typing import Any

import click

from hpcsgd import compress, strategies
from hpcsgd.commands import signals
from hpcsgd.commands.options import OPTIMIZERS
from hpcsgd.commands.train.click_options import click_options
from hpcsgd.commands.train.settings import NAMES_ELSEWHERE, Settings
from hpcsgd.training import data, models

# Parameters of registry rows that are not options of a spec: filled in by the command, or of no use to it.
_FILLED_IN = ("params", "lr", "shape", "classes")
_RARELY_USED = ("foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay")


class _CommandWithRegistries(click.Command):
    """A command whose help lists the names that its spec options accept."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; for an option of other programs name ours."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = NAMES_ELSEWHERE.get(error.option_name.removeprefix("--").replace("-", "_"))
            if name is None:
                raise
            text = f"No such option {error.option_name!r}. Did you mean '--{name.replace('_', '-')}'?"
            raise click.NoSuchOption(error.option_name, text, ctx=error.ctx) from None

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from hpcsgd import registry

        for title, known in _registries().items():
            rows = [
                (f"{name}:{options}" if options else name, summary + _accepted(known[name]))
                for name, options, summary in registry.describe(known, _FILLED_IN + _RARELY_USED)
            ]
            with formatter.section(title):
                formatter.write_dl(rows, col_max=40)


def _accepted(entry: object) -> str:
    """The options of a run that a strategy accepts and not all do."""
    flags = {"--compress": "accepts_compression", "--virtual-nodes": "accepts_virtual_nodes"}
    accepted = [flag for flag, attribute in flags.items() if getattr(entry, attribute, False)]
    return f" With {' and '.join(accepted)}." if accepted else ""


def _registries() -> dict[str, Any]:
    from hpcsgd.strategies import delays

    return {
        "Data sets (--data)": data.DATASETS,
        "Models (--model), or module:callable of your own": models.MODELS,
        "Strategies (--strategy)": strategies.STRATEGIES,
        "Compression (--compress), or none": compress.COMPRESSORS,
        "Wrappers of compression (--compress ef+maxnorm:bits=4)": compress.WRAPPERS,
        "Optimizers (--optimizer)": OPTIMIZERS,
        "Simulated delays (--delays)": delays.DELAYS,
    }


@click.command(cls=_CommandWithRegistries)
@click_options
@click.option(
    "--trace", is_flag=True, help="Record a timeline of both threads of every rank: trace.json in the folder."
)
def train(settings: Settings, trace: bool) -> None:
    """Train a model on all ranks: mpiexec -n 4 hpcsgd train.

    A NAME takes options: --strategy local:period=16. The run's folder holds config.toml (all settings: run
    them again with --config), metrics.jsonl and checkpoints. SIGUSR1 and SIGTERM end the run with a
    checkpoint and exit status 0; --resume FOLDER continues it. The file `done` marks a finished run.
    """
    signals.defer_sigusr1()
    from hpcsgd.commands.train.trainer import train as execute

    execute(settings, trace)
    signals.ignore_stops()
