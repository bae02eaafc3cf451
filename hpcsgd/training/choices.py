"""Options of `Run` that are one of a few words; without torch, so that a command's help needs none."""

from __future__ import annotations

from typing import Literal

Algorithm = Literal["auto", "library", "ring", "node", "two-level"]
Buffers = Literal["broadcast", "average", "local"]
Nonfinite = Literal["error", "skip"]
Sparse = Literal["rows", "dense"]
Uneven = Literal["join", "stop"]
Unused = Literal["zeros", "error"]
Wait = Literal["backward", "step"]
