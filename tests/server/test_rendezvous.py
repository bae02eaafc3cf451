"""The rendezvous file: complete, private, and never taken from another kind of file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hpcsgd.errors import HpcsgdError
from hpcsgd.server.proof import new_secret
from hpcsgd.server.rendezvous import Endpoint, RendezvousFile


def test_rendezvous_file_survives_writing(tmp_path: Path) -> None:
    path = tmp_path / "meeting"
    meeting = RendezvousFile(
        new_secret(), [Endpoint(["10.0.0.1", "127.0.0.1"], 4711, "0a" * 32), Endpoint(["h"], 1)]
    )
    old = os.umask(0)
    try:
        path.write_text("what another job has left")
        meeting.write(path)
    finally:
        os.umask(old)
    assert RendezvousFile.read(path) == meeting
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["meeting"]


@pytest.mark.parametrize(
    "junk",
    [b"", b"\xff\xfe\x00junk", b"[]", b"{}", b"3", b'{"secret": "x"}', b'{"secret": "x", "servers": 3}']
    + [b'{"secret": "x", "servers": [[["h"], %s, ""]]}' % port for port in (b'"p"', b"0", b"70000", b"1e999")]
    + [
        b'{"secret": "x", "servers": [[["h"], 1, %s]]}' % text
        for text in (b"3", b'"a1"', b'"%s"' % (b"z" * 64))
    ]
    + [b'{"secret": "x", "servers": []}', b'{"secret": "x", "servers": [["h", 1, ""]]}']
    + [b'{"secret": "x", "servers": [[[], 1, ""]]}']
    + [b'{"secret": "x", "servers": [["h"]]}', b'{"secret": "x", "servers": [[["h"], 1]]}', b"[" * 100_000],
    ids=lambda junk: repr(junk[:40]),
)
def test_file_of_another_kind_is_an_error(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "meeting"
    path.write_bytes(junk)
    with pytest.raises(HpcsgdError, match="is not a file of"):
        RendezvousFile.read(path)


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RendezvousFile.read(tmp_path / "meeting")
