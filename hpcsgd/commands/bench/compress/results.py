"""What `hpcsgd bench compress` shows and writes of each method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.compress.contenders import COPY, FLOAT32, GLOO
from hpcsgd.commands.bench.compress.problem import Problem

ALLREDUCE = "all-reduce"

_NOTES = (
    "encode, norms included, and decode: on each rank without communication, all ranks at once; x: times a "
    "memory copy. bits: counted bytes of an all-reduce, as a share of float32's, times 32. error: relative "
    "L2, of the first all-reduce, before there is a residual or a start from the step before. against: how "
    "many times as fast. "
)
_GOALS = {
    True: "Goal: 4 bits (maxnorm:bits=4) in less time than gloo float32.",
    False: "Goals for 64 MiB on 4 hosts at 1 Gbit/s, against float32: 4 bits 4.3, 2 bits 6.5 times as fast.",
}


@dataclass
class Result:
    """What was measured of one method.

    Attributes
    ----------
    seconds
        Of each phase, and of the whole "all-reduce"; (calls,) each.
    error
        Relative, of the first result; NaN where there is none.
    sent
        Bytes that a rank moved through MPI and shared memory in an all-reduce, the mean of the ranks; NaN
        where it is not known.
    """

    seconds: dict[str, np.ndarray]
    error: float = np.nan
    sent: float = np.nan


def report(problem: Problem, title: str, results: dict[str, Result]) -> None:
    """Print a table of one kind of gradients."""

    def median(name: str, phase: str) -> float:
        return float(np.median(results[name].seconds.get(phase, np.nan)))

    lines = []
    for name, result in results.items():
        whole = median(name, ALLREDUCE)
        cells = [_times(median(name, phase), median(COPY, phase)) for phase in ("encode", "decode")]
        cells += [_shown(_bits(results, name), ".2f"), _shown(result.error, ".2g"), f"{1e3 * whole:.1f}"]
        cells += [f"{median(peer, ALLREDUCE) / whole:.2f}" for peer in (COPY, FLOAT32, GLOO)]
        lines.append([name, *cells])
    header = ["", "encode\nms", "decode\nms", "bits /\nelement", "error", "all-\nreduce ms"]
    header += [f"against\n{peer}" for peer in ("copy", "float32", "gloo")]
    world = problem.world
    title = f"mean of {problem.numel / 1e6:.1f} M float32, {output.layout(world)}, {title}"
    notes = f"{_NOTES}{_GOALS[world.nodes == 1]} {torch.get_num_threads()} compute thread(s) a rank."
    output.show(title, header, lines, notes)


def rows(problem: Problem, data: str, results: dict[str, Result]) -> list[output.Row]:
    """Lines of a CSV file, one for each method and phase."""
    facts = output.facts(problem.world)
    return [
        {
            "data": data,
            "method": name,
            "phase": phase,
            "elements": problem.numel,
            **output.milliseconds(seconds),
            "bytes": _shown(result.sent, ".0f"),
            "bits_per_element": _shown(_bits(results, name), ".4f"),
            "times_fewer_bytes": _shown(32 / _bits(results, name), ".3f"),
            "relative_error": _shown(result.error, ".4g"),
            **facts,
        }
        for name, result in results.items()
        for phase, seconds in result.seconds.items()
    ]


def _bits(results: dict[str, Result], name: str) -> float:
    """Of an element on the wire, where float32 has 32."""
    return 32 * results[name].sent / results[FLOAT32].sent


def _times(seconds: float, copy: float) -> str:
    return "" if np.isnan(seconds) else f"{1e3 * seconds:.1f} {seconds / copy:.1f}x"


def _shown(number: float, form: str) -> str:
    return "" if np.isnan(number) else format(number, form)
