"""`hpcsgd bench push`: the rate of pushes and pulls between a client and a parameter server."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hpcsgd.commands.bench import output
from hpcsgd.commands.serve.service import ServeOptions, Service
from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World
from hpcsgd.server import Policy, Server
from hpcsgd.server.connection import Connector
from hpcsgd.server.mpi_link import MPILink
from hpcsgd.server.store import Store
from hpcsgd.strategies.parameter_server.connect import MPIConnector, TCPConnector
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
    """Time pushes and pulls on two ranks, of which the second is the server; rank 0 prints a table.

    Parameters
    ----------
    mib
        Model size in MiB of float32. Default 64.
    repeats
        Repetitions; medians are shown. Default 5.
    listen
        Rendezvous file of the TCP server, as for `hpcsgd serve`, in a folder that both ranks share; the
        server's log is written beside it.
    link_mbit
        Link rate of each host in Mbit/s, to which the rates are compared. Default: no comparison.
    csv
        A CSV file for the results. Default: none.
    """
    with World(device="cpu") as world:
        if world.size != 2:
            raise BadOption(
                "bench push measures one client and one server",
                expected="2 ranks",
                got=f"{world.size}",
                do="start it with mpiexec -n 2",
                everywhere=True,
            )
        output.check_writable(world, None if csv is None else Path(csv))
        rows: list[output.Row] = []
        measured = {
            "MPI": _over_mpi(world, mib, repeats),
            "TCP, with log": _over_tcp(world, mib, repeats, Path(listen), tls=False),
            "TLS, with log": _over_tcp(world, mib, repeats, Path(listen), tls=True),
        }
        for name, requests in measured.items():
            for request, seconds in requests.items():
                rows.append(_row(name, request, mib, seconds, link_mbit))
        if world.rank == 0:
            _show(rows, mib, link_mbit)
            if csv is not None:
                output.write_csv(Path(csv), rows)


def _over_mpi(world: World, mib: float, repeats: int) -> dict[str, np.ndarray]:
    """Seconds per request between two ranks of a job."""
    alone, net = world.split(world.rank), world.control.dup("parameter server")
    seconds: dict[str, np.ndarray] = {}
    if world.rank == 0:
        seconds = _time_requests(alone, MPIConnector(net, 1, 0, world.traffic), mib, repeats)
    else:
        server = Server(_POLICY)
        server.add_link(MPILink(net, 0, 0, server, "rank 0", world.traffic))
        while server.links:
            world.waiter.until(lambda: server.pump(server.links) > 0, "requests of rank 0")
    alone.close()
    return seconds


def _over_tcp(world: World, mib: float, repeats: int, listen: Path, tls: bool) -> dict[str, np.ndarray]:
    """Seconds per request between two jobs, encrypted or not."""
    alone = world.split(world.rank)
    seconds: dict[str, np.ndarray] = {}
    if world.rank == 0:
        seconds = _time_requests(alone, TCPConnector(listen, 0, world.traffic), mib, repeats)
    else:
        from hpcsgd.commands.serve.dashboard import ServerDashboard
        from hpcsgd.commands.serve.persistence import ServerPersistence
        from hpcsgd.server.proof import new_secret

        options = ServeOptions(listen, _POLICY.mode, _POLICY.alpha, progress="off", tls=tls)
        folder = listen.with_name(f"{listen.name}.checkpoint")
        with ServerPersistence(folder, options.checkpoint_every) as state:
            Service(options, alone, state, new_secret(), ServerDashboard("off")).run()
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
    alone.close()
    return seconds


def _time_requests(world: World, connector: Connector, mib: float, repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each repeat of each request, (repeats,)."""
    count = max(1, round(mib * 2**20 / 4 / _TENSOR))
    tensors = [(str(i), torch.empty(_TENSOR, device="cpu")) for i in range(count)]
    model, reply = TensorGroup(world, tensors), TensorGroup(world, tensors)
    store = Store(world, [connector], "bench", {"model": model}, {"mode": _POLICY.mode})
    store.init("model", model).wait()
    requests: dict[str, Callable[[], object]] = {
        "push": lambda: store.push("model", model).wait(),
        "pull": lambda: store.pull("model", reply).wait(),
        "push and pull": lambda: store.pushpull("model", model, reply).wait(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in requests}
    for repeat in range(repeats + 1):
        for name, request in requests.items():
            started = time.perf_counter()
            request()
            if repeat:  # the first one allocates memory
                seconds[name].append(time.perf_counter() - started)
    store.close()
    return {name: np.array(times) for name, times in seconds.items()}


def _row(over: str, request: str, mib: float, seconds: np.ndarray, link_mbit: float | None) -> output.Row:
    rate = mib * 2**20 / np.median(seconds)
    share = {} if link_mbit is None else {"share_of_link": round(8e-6 * rate / link_mbit, 3)}
    times = output.milliseconds(seconds)
    return {
        "over": over,
        "request": request,
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
    notes = "Rates are per direction: push and pull transfers the model in both directions at once."
    output.print_table(f"{mib:g} MiB of float32 in buckets of 4 MiB, one server", header, cells, notes)
