"""The files of a checkpoint: synced to disk, verified by digest, and loaded without running code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

FORMAT = 1
MANIFEST = "manifest.json"

_PLAIN = (type(None), bool, int, float, str, torch.Tensor, torch.nn.Parameter)


class Fault(Exception):
    """The failure of one rank, small and picklable, from which all ranks raise the same error.

    Parameters
    ----------
    what, expected, got, do
        As those of `hpcsgd.errors.HpcsgdError`.
    damage
        Whether files of a checkpoint are damaged, so that an older checkpoint is the remedy. Default False.
    """

    def __init__(
        self,
        what: str,
        expected: str | None = None,
        got: str | None = None,
        do: str | None = None,
        damage: bool = False,
    ) -> None:
        super().__init__(what, expected, got, do, damage)
        self.what, self.expected, self.got, self.do, self.damage = what, expected, got, do, damage

    def __str__(self) -> str:
        return self.what


def write_state(path: Path, state: Mapping[str, Any]) -> dict[str, object]:
    """Write a state to a new file and sync it to disk.

    Returns
    -------
    dict
        ``sha256`` and ``bytes`` of the intended content.

    Raises
    ------
    Fault
        The state contains a value that could not be loaded again; the fault names its key.
    OSError
        The file cannot be written.
    """
    _check_loadable(state, "state")
    with open(path, "xb") as file:
        writer = _HashingWriter(file)
        try:
            torch.save(state, cast(BinaryIO, writer))
        except RuntimeError:
            # torch replaces the OSError of a failed write by an error without the reason.
            raise writer.error or Fault(f"torch cannot write {path}") from None
        file.flush()
        os.fsync(file.fileno())
        return {"sha256": writer.digest.hexdigest(), "bytes": file.tell()}


def read_state(path: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Read a state to the CPU, after a check that the file is the one that `write_state` wrote.

    Raises
    ------
    Fault
        The file is missing, has another size or digest, or contains more than plain data.
    """
    if not path.is_file():
        raise Fault(f"{path} is {'not a file' if path.exists() else 'missing'}", damage=True)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            raise Fault(f"{path} is damaged", f"{entry['bytes']} bytes", f"{size} bytes", damage=True)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry["sha256"]:
            expected, got = (f"sha256 {text[:16]}…" for text in (entry["sha256"], digest))
            raise Fault(f"{path} is damaged", expected, got, damage=True)
        file.seek(0)
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            # torch's own message advises to load the file as a pickle, which would run its code.
            what = f"{path} is refused: it contains more than tensors and plain values"
            raise Fault(what) from None
    return state


def write_manifest(folder: Path, body: Mapping[str, object]) -> None:
    """Write the manifest of a folder, with a digest of itself, and sync both to disk.

    Raises
    ------
    TypeError, OSError
        The body is not JSON; the file cannot be written.
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
        The manifest is missing, damaged, or of another format.
    """
    path = folder / MANIFEST
    try:
        body: dict[str, Any] = json.loads(path.read_bytes())
        digest = body.pop("sha256")
        intact = digest == _digest(body)
    except FileNotFoundError:
        raise Fault(f"{path} is missing", damage=True) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise Fault(f"{path} is damaged", damage=True)
    if body["format"] != FORMAT:
        do = f"resume with the version of hpcsgd that wrote it: {body.get('hpcsgd')}"
        raise Fault(f"{path} has another format", str(FORMAT), str(body["format"]), do)
    return body


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, so that new names survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(path: Path) -> None:
    """Delete a folder, or the file that has taken its place, if there is any."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _HashingWriter:
    """A file with the digest of the bytes passed to `write`, whether or not they reached the disk."""

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
    # Through JSON and back first: tuples, and keys that are not strings, change on the way.
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
    """Check by a trial that torch's safe loader accepts a value that is not plain."""
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
