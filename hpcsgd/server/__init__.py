"""The parameter server: shards of a model, and clients that push and pull them (arXiv 1801.03855)."""

from __future__ import annotations

from hpcsgd.server.server import Policy, Server

__all__ = ["Policy", "Server"]
