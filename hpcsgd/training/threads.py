"""The number of torch's compute threads in a run: this rank's share of the cores, or the user's own."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from hpcsgd.mpi.world import World


class ComputeThreads:
    """Sets the number of torch's threads where several ranks share a node, and restores it.

    A number that the user has set, by `OMP_NUM_THREADS` or `torch.set_num_threads`, stays as it is.
    """

    def __init__(self, world: World) -> None:
        self._before = torch.get_num_threads()
        own = "OMP_NUM_THREADS" in os.environ or self._before not in _defaults()
        self._set = None if own or world.local_size == 1 else world.local.threads
        if self._set is not None:
            torch.set_num_threads(self._set)

    def restore(self) -> None:
        """Set the former number, unless the user has set another one since."""
        if self._set is not None and torch.get_num_threads() == self._set:
            torch.set_num_threads(self._before)
        self._set = None


def _defaults() -> set[int]:
    """The numbers of threads with which torch begins: of cores, physical or not, that the process may use."""
    counts = {os.cpu_count() or 1, len(os.sched_getaffinity(0))}
    text = Path("/proc/cpuinfo").read_text()
    cores = re.findall(r"^physical id\s*: (\d+).*?^core id\s*: (\d+)", text, re.MULTILINE | re.DOTALL)
    return counts | {len(set(cores))} if cores else counts
