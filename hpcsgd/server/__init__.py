"""Parameter server: shards of a model that clients push to and pull from (PS/MPI, arXiv 1801.03855)."""

from __future__ import annotations

from hpcsgd.server.policy import Policy
from hpcsgd.server.server import Server

__all__ = ["Policy", "Server"]
