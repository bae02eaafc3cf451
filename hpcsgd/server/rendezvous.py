"""Rendezvous file: addresses of servers, and what their clients need to be admitted."""

from __future__ import annotations

import json
import os
import string
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from hpcsgd.errors import HpcsgdError

_FINGERPRINT_LENGTH = 64


class Endpoint(NamedTuple):
    """Where a server listens."""

    addresses: list[str]  # addresses at which it may be reached
    port: int  # its port, at each of them
    fingerprint: str = ""  # SHA-256 of its certificate, in hexadecimal; "": its links are not encrypted


@dataclass
class RendezvousFile:
    """Endpoints of the servers of a job and the secret by which groups authenticate, in a file."""

    secret: str  # key of the HMACs by which clients and servers authenticate each other
    servers: list[Endpoint]  # endpoint of each server

    def write(self, path: Path) -> None:
        """Write the file atomically, readable by its owner only."""
        write_private(path, asdict(self))

    @staticmethod
    def read(path: Path) -> RendezvousFile:
        """Raises `HpcsgdError` for a file of another kind, `OSError` for one that cannot be read."""
        text = path.read_text(errors="replace")
        try:
            found = json.loads(text)
            servers = [_parse_endpoint(*row) for row in found["servers"]]
            if not servers:
                raise ValueError
            return RendezvousFile(str(found["secret"]), servers)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise HpcsgdError(
                f"{path} is not a file of `hpcsgd serve --listen`",
                got=text[:80],
                do="pass to --connect the file that the servers write: hpcsgd serve --listen FILE",
            ) from None


def write_private(path: Path, content: object) -> None:
    """Write JSON to a file atomically, readable by its owner only."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(content, file)
    os.replace(partial, path)


def _parse_endpoint(addresses: list[str], port: int, fingerprint: str) -> Endpoint:
    has_digits = len(fingerprint) in (0, _FINGERPRINT_LENGTH) and set(fingerprint) <= set(string.hexdigits)
    if not 0 < int(port) < 2**16 or not has_digits or not isinstance(addresses, list) or not addresses:
        raise ValueError
    return Endpoint([str(address) for address in addresses], int(port), fingerprint)
