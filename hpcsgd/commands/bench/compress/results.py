"""The tables and CSV columns of `hpcsgd bench compress`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.compress.contenders import COPY, FLOAT32, GLOO
from hpcsgd.commands.bench.compress.problem import AveragingProblem
from hpcsgd.commands.bench.output import Column, Results, Timed, times

ALLREDUCE = "all-reduce"

_NOTES = (
    "encode (with norms) and decode: without communication, all ranks at once; x: multiples of a memory "
    "copy. bits: 32 times the bytes of an all-reduce relative to float32. error: relative L2 error of the "
    "first all-reduce, before there is a residual or a warm start. speed-up: over the named method. "
)


@dataclass(frozen=True)
class Measurement(Timed):
    """One phase of a method on one kind of gradients, or one kernel."""

    data: str
    method: str
    phase: str
    elements: int
    seconds: np.ndarray  # (calls,)
    moved: float = math.nan  # bytes
    bits: float = math.nan  # per element on the wire, where float32 has 32
    error: float = math.nan  # relative


CSV_COLUMNS: list[Column[Measurement]] = [
    Column(lambda m: m.data, "data"),
    Column(lambda m: m.method, "method"),
    Column(lambda m: m.phase, "phase"),
    Column(lambda m: m.elements, "elements"),
    *times(lambda m: m.seconds),
    Column(lambda m: m.moved, "bytes", digits=None),
    Column(lambda m: m.bits, "bits_per_element"),
    Column(lambda m: 32 / m.bits, "times_fewer_bytes", digits=3),
    Column(lambda m: m.error, "relative_error", digits=12),
]


@dataclass
class SchemeResult:
    """Measurements of one method."""

    seconds: dict[str, np.ndarray]  # of each phase, and of the whole "all-reduce"; (calls,) each
    error: float = math.nan  # relative, of the first result
    sent: float = math.nan  # bytes per rank through MPI and shared memory, mean over the ranks

    def median(self, phase: str) -> float:
        """Median seconds of a phase; NaN if it was not measured."""
        return float(np.median(self.seconds.get(phase, np.nan)))


def scheme_table(problem: AveragingProblem, title: str, results: dict[str, SchemeResult]) -> Results[str]:
    """The table for one kind of gradients, with a row per method."""

    def against_copy(phase: str) -> Column[str]:
        def cell(name: str) -> str | None:
            seconds, copy = (results[each].median(phase) for each in (name, COPY))
            return None if math.isnan(seconds) else f"{1e3 * seconds:.1f} {seconds / copy:.1f}x"

        return Column(cell, heading=f"{phase}\nms")

    def whole(name: str) -> float:
        return results[name].median(ALLREDUCE)

    def speed_up(baseline: str, name: str) -> Column[str]:
        return Column(lambda n: whole(baseline) / whole(n), heading=f"speed-up\nover {name}", form=".2f")

    columns = [
        Column[str](lambda name: name, heading=""),
        against_copy("encode"),
        against_copy("decode"),
        Column[str](lambda name: bits(results, name), heading="bits /\nelement", form=".2f"),
        Column[str](lambda name: results[name].error, heading="error", form=".2g"),
        Column[str](lambda name: 1e3 * whole(name), heading="all-\nreduce ms", form=".1f"),
        *map(speed_up, (COPY, FLOAT32, GLOO), ("copy", "float32", "gloo")),
    ]
    ranks, threads = output.describe_ranks(problem.world), torch.get_num_threads()
    title = f"mean of {problem.numel / 1e6:.1f} M float32, {ranks}, {title}"
    return Results(columns, list(results), title, f"{_NOTES}{threads} compute thread(s) per rank.")


def measurements(data: str, elements: int, results: dict[str, SchemeResult]) -> list[Measurement]:
    """All phases of all methods, for the CSV file."""
    return [
        Measurement(data, name, phase, elements, seconds, result.sent, bits(results, name), result.error)
        for name, result in results.items()
        for phase, seconds in result.seconds.items()
    ]


def bits(results: dict[str, SchemeResult], name: str) -> float:
    """Bits per element on the wire, where float32 has 32."""
    return 32 * results[name].sent / results[FLOAT32].sent
