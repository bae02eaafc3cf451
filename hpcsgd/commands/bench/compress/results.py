"""The tables and CSV rows of `hpcsgd bench compress`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.compress.contenders import COPY, FLOAT32, GLOO
from hpcsgd.commands.bench.compress.problem import AveragingProblem

ALLREDUCE = "all-reduce"

_NOTES = (
    "encode (with norms) and decode: without communication, all ranks at once; x: multiples of a memory "
    "copy. bits: 32 times the bytes of an all-reduce relative to float32. error: relative L2 error of the "
    "first all-reduce, before there is a residual or a warm start. speed-up: over the named method. "
)
_GOALS = {
    True: "Goal: 4 bits (maxnorm:bits=4) in less time than gloo float32.",
    False: "Goals for 64 MiB on 4 hosts at 1 Gbit/s: speed-up over float32 of 4.3 at 4 bits, 6.5 at 2 bits.",
}


@dataclass
class SchemeResult:
    """Measurements of one method.

    Attributes
    ----------
    seconds
        Seconds of each phase, and of the whole "all-reduce"; (calls,) each.
    error
        Relative error of the first result; NaN if there is none.
    sent
        Bytes per rank that an all-reduce moved through MPI and shared memory, mean over the ranks; NaN if
        unknown.
    """

    seconds: dict[str, np.ndarray]
    error: float = np.nan
    sent: float = np.nan


def report(problem: AveragingProblem, title: str, results: dict[str, SchemeResult]) -> None:
    """Print the table for one kind of gradients."""

    def median(name: str, phase: str) -> float:
        return float(np.median(results[name].seconds.get(phase, np.nan)))

    lines = []
    for name, result in results.items():
        whole = median(name, ALLREDUCE)
        cells = [_format_ratio(median(name, phase), median(COPY, phase)) for phase in ("encode", "decode")]
        cells += [_format(_bits(results, name), ".2f"), _format(result.error, ".2g"), f"{1e3 * whole:.1f}"]
        cells += [f"{median(baseline, ALLREDUCE) / whole:.2f}" for baseline in (COPY, FLOAT32, GLOO)]
        lines.append([name, *cells])
    header = ["", "encode\nms", "decode\nms", "bits /\nelement", "error", "all-\nreduce ms"]
    header += [f"speed-up\nover {baseline}" for baseline in ("copy", "float32", "gloo")]
    world = problem.world
    title = f"mean of {problem.numel / 1e6:.1f} M float32, {output.describe_ranks(world)}, {title}"
    notes = f"{_NOTES}{_GOALS[world.nodes == 1]} {torch.get_num_threads()} compute thread(s) per rank."
    output.print_table(title, header, lines, notes)


def rows(problem: AveragingProblem, data: str, results: dict[str, SchemeResult]) -> list[output.Row]:
    """Rows of the CSV file, one per method and phase."""
    environment = output.environment(problem.world)
    return [
        {
            "data": data,
            "method": name,
            "phase": phase,
            "elements": problem.numel,
            **output.milliseconds(seconds),
            "bytes": _format(result.sent, ".0f"),
            "bits_per_element": _format(_bits(results, name), ".4f"),
            "times_fewer_bytes": _format(32 / _bits(results, name), ".3f"),
            "relative_error": _format(result.error, ".4g"),
            **environment,
        }
        for name, result in results.items()
        for phase, seconds in result.seconds.items()
    ]


def _bits(results: dict[str, SchemeResult], name: str) -> float:
    """Bits per element on the wire, where float32 has 32."""
    return 32 * results[name].sent / results[FLOAT32].sent


def _format_ratio(seconds: float, copy: float) -> str:
    return "" if np.isnan(seconds) else f"{1e3 * seconds:.1f} {seconds / copy:.1f}x"


def _format(number: float, form: str) -> str:
    return "" if np.isnan(number) else format(number, form)
