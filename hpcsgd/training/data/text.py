"""Data for a language model of bytes: source code, or any files."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from hpcsgd.errors import HpcsgdError
from hpcsgd.registry import Within, checked
from hpcsgd.registry.limits import Size
from hpcsgd.training.data.base import Data

_HELD_OUT = 0.1
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class WindowSource:
    """A source of disjoint windows of a text, with the windows shifted by one as targets.

    Parameters
    ----------
    tokens
        The text, (length,) uint8.
    context
        Tokens a window; the last, incomplete window is dropped.
    """

    labels = None

    def __init__(self, tokens: Tensor, context: int) -> None:
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.context

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, both (n, context) int64."""
        positions = indices[:, None] * self.context + torch.arange(self.context, device="cpu")
        return self.tokens[positions].long(), self.tokens[positions + 1].long()


@checked
def text(files: str = "", context: Size = 64, limit: Annotated[float, Within(1e-6, 1e6)] = 4.0) -> Data:
    """Bytes of text, each predicted from the preceding ones; a tenth, in whole files, is held out.

    Parameters
    ----------
    files
        A file, a folder (with its subfolders) or a glob pattern. Default: the source of Python's
        standard library without its tests, 12 MB in Python 3.11.
    context
        Bytes a window. Default 64.
    limit
        Megabytes to read at most, of files in the order of a hash of their names. Default 4.

    Raises
    ------
    HpcsgdError
        No such file, or not enough text.
    """
    texts = _read(_user_files(files) if files else _library(), limit * 1e6)
    train, test = _split(texts)
    if min(len(train), len(test)) <= context:
        raise HpcsgdError(
            "not enough text",
            expected=f"more than {context} bytes to train on, and to test",
            got=f"{len(train)} and {len(test)} bytes",
            do="set --data text:files=… to more text, a larger limit= or a smaller context=",
        )
    used = np.unique(np.frombuffer(train + test, np.uint8))
    token = np.zeros(256, np.uint8)
    token[used] = np.arange(len(used))

    def source(part: bytes) -> WindowSource:
        return WindowSource(torch.from_numpy(token[np.frombuffer(part, np.uint8)]), context)

    return Data(source(train), source(test), kind="language", shape=(context,), classes=len(used))


def _library() -> dict[str, Path]:
    root = sysconfig.get_path("stdlib")
    found = {}
    for folder, inside, names in os.walk(root):
        inside[:] = (name for name in inside if name not in _NOT_LIBRARY)  # walk never enters them
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            found[str(file.relative_to(root))] = file
    return found


def _user_files(pattern: str) -> dict[str, Path]:
    """Return files by their names below their common folder, without hidden files in folders."""
    root = Path(pattern).expanduser()
    if root.is_dir():
        inside = [file for file in root.rglob("*") if file.is_file()]
        found = [file for file in inside if not _hidden(file.relative_to(root))]
    else:
        found = [Path(file) for file in glob.glob(str(root), recursive=True)]
        found = [file for file in found if file.is_file()]
    if not found:
        do = "set --data text:files=… to a file, a folder or a glob pattern"
        raise HpcsgdError("no text files", got=f"nothing at {root.absolute()}", do=do)
    shared = os.path.commonpath([file.parent for file in found])
    return {str(file.relative_to(shared or ".")): file for file in found}


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _read(files: dict[str, Path], limit: float) -> list[bytes]:
    """Return contents in the order of a hash of the names, up to a limit, without empty or repeated ones.

    Without repeated ones, because a copy of a training file must not be held out.
    """
    texts: dict[bytes, None] = {}
    remaining = int(limit)
    for name in sorted(files, key=_hash):
        with files[name].open("rb") as file:
            content = file.read(remaining)
        if content:
            texts[content] = None
            remaining -= len(content)
        if remaining <= 0:
            break
    return list(texts)


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()


def _split(texts: list[bytes]) -> tuple[bytes, bytes]:
    """Return training and test text: whole files, or the beginning and the end of a single file."""
    if len(texts) < 2:
        content = b"".join(texts)
        cut = int(len(content) * (1 - _HELD_OUT))
        return content[:cut], content[cut:]
    held_out = _held_out([len(content) for content in texts])
    train = (content for index, content in enumerate(texts) if index not in held_out)
    return b"".join(train), b"".join(texts[index] for index in sorted(held_out))


def _held_out(sizes: list[int]) -> set[int]:
    """Return the files for the test: the first that fit into a tenth of all bytes, or else the smallest."""
    remaining = _HELD_OUT * sum(sizes)
    chosen = set()
    for index, size in enumerate(sizes):
        if size <= remaining:
            chosen.add(index)
            remaining -= size
    return chosen or {min(range(len(sizes)), key=sizes.__getitem__)}
