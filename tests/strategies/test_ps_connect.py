"""Connection of a group to the servers of another job."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from hpcsgd import HpcsgdError
from hpcsgd.server.rendezvous import Endpoint, RendezvousFile
from hpcsgd.strategies.parameter_server.connect import group_name, make_connectors


@pytest.mark.mpi
def test_all_ranks_wait_for_the_file_and_have_the_same_name(world: Any, tmp_path: Path) -> None:
    path = Path(world.gather(str(tmp_path))[0], "servers")
    if world.rank == 0:
        meeting = RendezvousFile("secret", [Endpoint(["127.0.0.1"], port) for port in (1, 2, 3)])
        threading.Timer(0.3, meeting.write, [path]).start()
    found = make_connectors(path, world)
    assert [connector.server_name for connector in found] == [
        f"server {index} of {path}" for index in range(3)
    ]
    names = world.gather(group_name(world, 3))
    assert len(set(names)) == 1 and group_name(world, 3) != names[0] and world.host in names[0]
    assert group_name(world, 9) < group_name(world, 10)


@pytest.mark.mpi
def test_missing_or_invalid_file_is_an_error_on_all_ranks(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(world, "timeout", 0.3)
    folder = Path(world.gather(str(tmp_path))[0])
    with pytest.raises(HpcsgdError, match="no server has written"):
        make_connectors(folder / "nothing", world)
    notice = f"hpcsgd: waiting up to 0.3 s for {folder / 'nothing'}, which the servers write\n"
    assert (notice in capfd.readouterr().err) == (world.rank == 0)
    if world.rank == 0:
        (folder / "junk").write_text("[1, 2]")
    with pytest.raises(HpcsgdError, match="is not a file of `hpcsgd serve"):
        make_connectors(folder / "junk", world)
