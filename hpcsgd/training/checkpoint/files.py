"""The files of a checkpoint: written through to the disk, checked by digest, loaded as data."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

FORMAT = 1
MANIFEST = "manifest.json"

_PLAIN = (type(None), bool, int, float, str, torch.Tensor, torch.nn.Parameter)


class Fault(Exception):
    """Why one rank cannot go on: small and picklable, so that all ranks can word the same error.

    Parameters
    ----------
    what, expected, got, do
        As in `hpcsgd.errors.HpcsgdError`.
    """

    def __init__(
        self,
        what: str,
        expected: str | None = None,
        got: str | None = None,
        do: str | None = None,
    ) -> None:
        super().__init__(what, expected, got, do)
        self.what, self.expected, self.got, self.do = what, expected, got, do

    def __str__(self) -> str:
        return self.what


def write_state(path: Path, state: Mapping[str, Any]) -> dict[str, object]:
    """Write a state to a new file and through to the disk.

    Returns
    -------
    dict
        ``sha256`` and ``bytes`` of what was meant to be written.

    Raises
    ------
    Fault
        The state holds something that could not be loaded again; names its key.
    OSError
        The file cannot be written.
    """
    _check_loadable(state, "state")
    with open(path, "xb") as file:
        writer = _HashingWriter(file)
        try:
            torch.save(state, cast(BinaryIO, writer))
        except RuntimeError:
            # torch answers a failed write with an error of its own, which hides the reason.
            raise writer.error or Fault(f"torch cannot write {path}") from None
        file.flush()
        os.fsync(file.fileno())
        return {"sha256": writer.digest.hexdigest(), "bytes": file.tell()}


def read_state(path: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Read a state onto the CPU, if its file is what `write_state` wrote.

    Raises
    ------
    Fault
        The file is missing, has another size or digest, or holds more than plain data.
    """
    if not path.is_file():
        raise Fault(f"{path} is missing")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            raise Fault(f"{path} is damaged", f"{entry['bytes']} bytes", f"{size} bytes")
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise Fault(f"{path} is damaged", f"sha256 {entry['sha256']}", f"sha256 {digest}")
        file.seek(0)
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            # torch's own text advises to load it as a pickle, which would run what it holds.
            what = f"{path} is refused: it holds more than tensors and plain values"
            raise Fault(what) from None
    return state


def write_manifest(folder: Path, body: Mapping[str, object]) -> None:
    """Write the manifest of a folder, with a digest of its own, and sync both.

    Raises
    ------
    TypeError, OSError
        JSON cannot hold the body; the file cannot be written.
    """
    with open(folder / MANIFEST, "x", encoding="utf-8") as file:
        json.dump({**body, "sha256": _digest(body)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder.

    Raises
    ------
    Fault
        It is missing, damaged, or of another format.
    """
    path = folder / MANIFEST
    try:
        body: dict[str, Any] = json.loads(path.read_bytes())
        digest = body.pop("sha256")
        whole = digest == _digest(body)
    except FileNotFoundError:
        raise Fault(f"{path} is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise Fault(f"{path} is damaged")
    if body["format"] != FORMAT:
        do = f"use the version of hpcsgd that wrote it: {body.get('hpcsgd')}"
        raise Fault(f"{path} has another format", str(FORMAT), str(body["format"]), do)
    return body


def sync_folder(folder: Path) -> None:
    """Write a folder's entries through to the disk, so that new names outlive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _HashingWriter:
    """A file that keeps the digest of what it was given, whatever the disk makes of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _digest(body: Mapping[str, object]) -> str:
    # Through JSON and back first: tuples and keys that are no text change on the way.
    plain = json.loads(json.dumps(body))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _check_loadable(value: object, key: str) -> None:
    if type(value) in (dict, OrderedDict):
        assert isinstance(value, dict)
        for name, item in value.items():
            _check_loadable(name, f"the key {name!r} of {key}")
            _check_loadable(item, f"{key}[{name!r}]")
    elif type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        for index, item in enumerate(value):
            _check_loadable(item, f"{key}[{index}]")
    elif type(value) not in _PLAIN or getattr(value, "__dict__", None):
        _probe(value, key)


def _probe(value: object, key: str) -> None:
    """Try what only torch knows: whether its loader takes a value that is not plain."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:
        raise Fault(
            f"{key} cannot be saved so that it loads without running code",
            expected="tensors, numbers, text and None in dicts, lists and tuples",
            got=f"{type(value).__module__}.{type(value).__qualname__}",
            do="turn it into one of these in state_dict()",
        ) from None
