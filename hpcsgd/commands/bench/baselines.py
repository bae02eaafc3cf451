"""The alternatives: MPI's own all-reduce, and gloo by torch.distributed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World

_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915


def mpi_mean(comm: Any, flat: Tensor) -> None:
    """Replace `flat` (1-D) by its mean over the ranks, by `MPI_Allreduce`."""
    from mpi4py import MPI

    buffer = flat.numpy()
    comm.Allreduce(MPI.IN_PLACE, buffer, MPI.SUM)
    np.multiply(buffer, buffer.dtype.type(1.0 / comm.size), out=buffer)


def gloo_mean(flat: Tensor) -> None:
    """Replace `flat` by its mean over the ranks, by gloo; inside `gloo`."""
    dist.all_reduce(flat)
    flat.mul_(1.0 / dist.get_world_size())


@contextlib.contextmanager
def gloo(world: World) -> Iterator[None]:
    """Context: torch.distributed's default group is gloo, over the ranks of `world`.

    Between nodes it uses `GLOO_SOCKET_IFNAME` where that is set, else the interface of the default
    route, else the first that has an address.
    """
    before = os.environ.get(_INTERFACE)
    name, address = _interface(world)
    os.environ[_INTERFACE] = name
    deadline = timedelta(seconds=world.timeout)
    try:
        store = _store(world, address, deadline)
        dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=deadline)
        yield
        world.control.barrier("the end of gloo")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.pop(_INTERFACE)
        if before is not None:
            os.environ[_INTERFACE] = before


def _store(world: World, address: str, deadline: timedelta) -> TCPStore:
    """The meeting point, at rank 0 on a port that is free there."""
    if world.rank == 0:
        store = TCPStore(address, 0, None, True, deadline, wait_for_workers=False)
        world.gather((address, store.port), "the address of gloo's store")
        return store
    host, port = world.gather(None, "the address of gloo's store")[0]
    return TCPStore(host, port, None, False, deadline)


def _interface(world: World) -> tuple[str, str]:
    """Name and IPv4 address of the interface by which the other ranks reach this one."""
    if _INTERFACE in os.environ:
        name = os.environ[_INTERFACE]
        return name, _addresses().get(name, "")
    if world.nodes == 1:
        return "lo", "127.0.0.1"
    found = {n: a for n, a in _addresses().items() if not a.startswith("127.")}
    if not found:
        raise HpcsgdError("this host has no IPv4 address for gloo", rank=world.rank, do=f"set {_INTERFACE}")
    default = _default_address()
    return next(((n, a) for n, a in found.items() if a == default), next(iter(found.items())))


def _addresses() -> dict[str, str]:
    """The IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _default_address() -> str:
    """Where packets to the world outside would leave from; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])
