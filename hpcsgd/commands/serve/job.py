"""`hpcsgd serve`: parameter servers in a job of their own, for groups of workers that come and go."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hpcsgd.commands.serve.dashboard import Board
from hpcsgd.commands.serve.service import Options, Service
from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World
from hpcsgd.server import tcp_link

_log = logging.getLogger("hpcsgd.server")


def serve(options: Options) -> None:
    """Serve until all groups that came are done, or a signal; collective: each rank is a server.

    Raises
    ------
    HpcsgdError
        On all ranks, for a folder of other servers, or one that is damaged.
    """
    folder = options.checkpoint or options.listen.with_name(f"{options.listen.name}.checkpoint")
    with World(device="cpu") as world:
        torch.set_num_threads(world.threads)
        told = world.together(lambda: _secret(folder, options, world.size) if world.rank == 0 else "")
        secret = world.gather(told, "the secret of the job")[0]
        with _board(options.progress, world.rank) as board:
            own = folder / f"server-{world.rank}"
            service = world.together(lambda: Service(options, world, own, secret, board))
            service.run()


def _secret(folder: Path, options: Options, servers: int) -> str:
    """What groups must know; it stays the same over all starts of the servers that have this folder."""
    own = {"mode": options.mode, "alpha": options.alpha, "servers": servers}
    path = folder / "job.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        aside = path.with_suffix(".partial")
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({**own, "secret": tcp_link.new_secret()}, file)
        os.replace(aside, path)
    found: dict[str, Any] = json.loads(path.read_text())
    for name, value in own.items():
        if found[name] != value:
            raise BadOption(
                f"{folder} is of servers with another {name}",
                expected=f"{name}={found[name]}",
                got=f"{name}={value}",
                do="start them as before, or name another --checkpoint folder",
            )
    return str(found["secret"])


@contextmanager
def _board(mode: str, rank: int) -> Iterator[Board]:
    """Where this server's messages go; all but the first show only their warnings."""
    board = Board(mode) if rank == 0 else Board("off" if mode == "off" else "plain", f"server {rank}: ")
    board.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    _log.addHandler(board)
    try:
        yield board
    finally:
        _log.removeHandler(board)
        board.close()
