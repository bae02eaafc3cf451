"""Job of parameter servers for groups of workers in other jobs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from hpcsgd.commands.serve.dashboard import ServerDashboard
from hpcsgd.commands.serve.options import ServeOptions
from hpcsgd.commands.serve.persistence import ServerPersistence
from hpcsgd.commands.serve.service import Service
from hpcsgd.errors import BadOption, HpcsgdError, os_errors, shown
from hpcsgd.mpi.world import World
from hpcsgd.server.proof import new_secret
from hpcsgd.server.rendezvous import write_private

_log = logging.getLogger("hpcsgd.server")
_DO = "free space there, make it writable, or choose another --checkpoint folder"


def serve(options: ServeOptions) -> None:
    """Serve until all groups are done, or until a signal; collective: each rank is a server.

    Raises
    ------
    HpcsgdError
        On all ranks, if the checkpoint folder belongs to other servers or is damaged.
    """
    folder = options.checkpoint or options.listen.with_name(f"{options.listen.name}.checkpoint")
    with World(device="cpu") as world:
        torch.set_num_threads(world.local.threads)
        created = world.collectively(lambda: _secret(folder, options, world.size) if world.rank == 0 else "")
        secret = world.gather(created, "the secret of the job")[0]
        with _dashboard(options.progress, world.rank) as dashboard, ExitStack() as stack:

            def start() -> Service:
                with os_errors(f"server {world.rank} cannot start", do=_DO):
                    subfolder = folder / f"server-{world.rank}"
                    state = stack.enter_context(ServerPersistence(subfolder, options.checkpoint_every))
                    return Service(options, world, state, secret, dashboard)

            service = world.collectively(start)
            service.run()


def _secret(folder: Path, options: ServeOptions, servers: int) -> str:
    """Secret of the job, which stays the same for all starts of the servers of this folder."""
    settings = {"mode": options.mode, "alpha": options.alpha, "servers": servers}
    path = folder / "job.json"
    with os_errors(f"the servers cannot use the folder {folder}", do=_DO):
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_private(path, {**settings, "secret": new_secret()})
        found = _parse(path)
    for name, value in settings.items():
        if found[name] != value:
            raise BadOption(
                f"{folder} belongs to servers with another {name}",
                expected=f"{name}={found[name]}",
                got=f"{name}={value}",
                do=f"start the servers with the same --{name}, or with another --checkpoint folder",
            )
    return str(found["secret"])


def _parse(path: Path) -> dict[str, Any]:
    text = path.read_text(errors="replace")
    try:
        found: dict[str, Any] = json.loads(text)
        return {name: found[name] for name in ("mode", "alpha", "servers", "secret")}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise HpcsgdError(
            f"{path} is damaged",
            got=shown(text),
            do="remove it and start the servers with the options that they had: they write a new one",
        ) from None


@contextmanager
def _dashboard(mode: str, rank: int) -> Iterator[ServerDashboard]:
    """Dashboard of this server; all but the first print warnings only."""
    if rank == 0:
        dashboard = ServerDashboard(mode)
    else:
        dashboard = ServerDashboard("off" if mode == "off" else "plain", f"server {rank}: ")
    dashboard.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    _log.addHandler(dashboard)
    try:
        yield dashboard
    finally:
        _log.removeHandler(dashboard)
        dashboard.close()
