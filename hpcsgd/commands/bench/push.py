"""`hpcsgd bench push`: how fast a model goes to a parameter server and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.timing import check_positive
from hpcsgd.commands.serve.service import Options, Service
from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World
from hpcsgd.server import Policy, Server
from hpcsgd.server.connection import Dial
from hpcsgd.server.mpi_link import MPILink
from hpcsgd.server.store import Store
from hpcsgd.strategies.parameter_server.connect import FileDial, RankDial
from hpcsgd.tensors.group import TensorGroup

_POLICY = Policy("elastic", alpha=0.5)
_TENSOR = 256 * 1024  # elements


def main(
    mib: float = 64.0,
    repeats: int = 5,
    listen: str | Path = "bench-push",
    link_mbit: float | None = None,
    csv: str | Path | None = None,
) -> None:
    """Measure on two ranks, of which the second serves; rank 0 prints a table.

    Parameters
    ----------
    mib
        Size of the model, float32, in MiB. Default 64.
    repeats
        Rounds; medians are shown. Default 5.
    listen
        A file that both ranks see, of a server as `hpcsgd serve` starts it; its log is written beside it.
    link_mbit
        Rate of each host's link in Mbit/s, to which rates are compared; None: not at all.
    csv
        Write the figures here too.
    """
    check_positive("mib and repeats", [mib, repeats])
    with World(device="cpu") as world:
        if world.size != 2:
            raise BadOption(
                "bench push measures a client and a server",
                expected="2 ranks",
                got=f"{world.size}",
                do="start it with mpiexec -n 2",
                everywhere=True,
            )
        output.check_writable(world, None if csv is None else Path(csv))
        rows: list[output.Row] = []
        for name, measure in (("MPI", _over_mpi), ("TCP, with log", _over_tcp)):
            for what, seconds in measure(world, mib, repeats, Path(listen)).items():
                rows.append(_row(name, what, mib, seconds, link_mbit))
        if world.rank == 0:
            _show(rows, mib, link_mbit)
            if csv is not None:
                output.write_csv(Path(csv), rows)


def _over_mpi(world: World, mib: float, repeats: int, listen: Path) -> dict[str, np.ndarray]:
    """Between two ranks of a job."""
    part, net = world.split(world.rank), world.control.twin(1)
    seconds: dict[str, np.ndarray] = {}
    if world.rank == 0:
        seconds = _ask(part, RankDial(net, 1, world.traffic), mib, repeats)
    else:
        server = Server(_POLICY)
        server.add(MPILink(net, 0, server, "rank 0", world.traffic))
        while server.links:
            world.waiter.until(lambda: server.pump(server.links) > 0, "requests of rank 0")
    part.close()
    return seconds


def _over_tcp(world: World, mib: float, repeats: int, listen: Path) -> dict[str, np.ndarray]:
    """Between two jobs."""
    part = world.split(world.rank)
    seconds: dict[str, np.ndarray] = {}
    if world.rank == 0:
        seconds = _ask(part, FileDial(listen, 0, world.traffic), mib, repeats)
    else:
        from hpcsgd.commands.serve.dashboard import Board
        from hpcsgd.server.tcp_link import new_secret

        options = Options(listen, _POLICY.mode, _POLICY.alpha, progress="off")
        folder = listen.with_name(f"{listen.name}.checkpoint")
        Service(options, part, folder, new_secret(), Board("off")).run()
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
    part.close()
    return seconds


def _ask(part: World, dial: Dial, mib: float, repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each repeat of each request."""
    count = max(1, round(mib * 2**20 / 4 / _TENSOR))
    tensors = [(str(i), torch.empty(_TENSOR)) for i in range(count)]
    model, answer = TensorGroup(part, tensors), TensorGroup(part, tensors)
    store = Store(part, [dial], "bench", {"model": model}, {"mode": _POLICY.mode})
    store.init("model", model).wait()
    requests: dict[str, Callable[[], object]] = {
        "push": lambda: store.push("model", model).wait(),
        "pull": lambda: store.pull("model", answer).wait(),
        "push and pull": lambda: store.pushpull("model", model, answer).wait(),
    }
    seconds: dict[str, list[float]] = {what: [] for what in requests}
    for turn in range(repeats + 1):
        for what, request in requests.items():
            started = time.perf_counter()
            request()
            if turn:  # the first one takes memory
                seconds[what].append(time.perf_counter() - started)
    store.close()
    return {what: np.array(times) for what, times in seconds.items()}


def _row(name: str, what: str, mib: float, seconds: np.ndarray, link_mbit: float | None) -> output.Row:
    rate = mib * 2**20 / np.median(seconds)
    share = {} if link_mbit is None else {"share_of_link": round(8e-6 * rate / link_mbit, 3)}
    times = output.milliseconds(seconds)
    return {
        "over": name,
        "request": what,
        "mib": mib,
        **times,
        "mb_per_second": round(rate / 1e6, 1),
        **share,
    }


def _show(rows: list[output.Row], mib: float, link_mbit: float | None) -> None:
    header = ["over", "request", "ms", "MB/s", *([] if link_mbit is None else ["share of the link"])]
    cells = [
        [
            str(row["over"]),
            str(row["request"]),
            f"{row['median_ms']:.1f}",
            f"{row['mb_per_second']:.0f}",
            *([] if link_mbit is None else [f"{row['share_of_link']:.0%}"]),
        ]
        for row in rows
    ]
    notes = "Rates are of each direction: push and pull send as much both ways at once."
    output.show(f"{mib:g} MiB of float32 in buckets of 4 MiB, one server", header, cells, notes)
