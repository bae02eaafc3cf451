"""Baselines: `MPI_Allreduce`, and gloo through torch.distributed."""

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

from hpcsgd.commands.bench.devices import synchronize
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World

_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915


def mpi_mean(comm: Any, flat: Tensor) -> None:
    """Replace `flat`, 1-D, by its mean over the ranks, with `MPI_Allreduce`; on a GPU a CUDA-aware one."""
    from mpi4py import MPI

    if flat.device.type != "cpu":
        synchronize(flat.device)  # MPI knows no streams: the values must be in memory
        comm.Allreduce(MPI.IN_PLACE, flat, MPI.SUM)
        flat.mul_(1.0 / comm.size)
        return
    buffer = flat.numpy()
    comm.Allreduce(MPI.IN_PLACE, buffer, MPI.SUM)
    np.multiply(buffer, buffer.dtype.type(1.0 / comm.size), out=buffer)


def gloo_mean(flat: Tensor) -> None:
    """Replace `flat` by its mean over the ranks, with gloo. Call it inside the context of `gloo`.

    gloo takes device memory too, and stages it through pinned host memory.
    """
    dist.all_reduce(flat)
    flat.mul_(1.0 / dist.get_world_size())


@contextlib.contextmanager
def gloo(world: World) -> Iterator[None]:
    """Context in which torch.distributed's default group is gloo over the ranks of `world`.

    Between nodes gloo uses the interface `GLOO_SOCKET_IFNAME`; default: that of the default route, else the
    first one with an address.
    """
    before = os.environ.get(_INTERFACE)
    name, address = _interface(world)
    os.environ[_INTERFACE] = name
    deadline = timedelta(seconds=world.timeout)
    try:
        store = _store(world, address, deadline)
        dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=deadline)
        yield
        world.control.barrier("the end of the gloo benchmark")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.pop(_INTERFACE)
        if before is not None:
            os.environ[_INTERFACE] = before


def _store(world: World, address: str, deadline: timedelta) -> TCPStore:
    """The rendezvous store, served by rank 0 on a free port."""
    if world.rank == 0:
        store = TCPStore(address, 0, None, True, deadline, wait_for_workers=False)
        world.gather((address, store.port), "the address of gloo's rendezvous store")
        return store
    host, port = world.gather(None, "the address of gloo's rendezvous store")[0]
    return TCPStore(host, port, None, False, deadline)


def _interface(world: World) -> tuple[str, str]:
    """Name and IPv4 address of the interface on which this rank listens."""
    if _INTERFACE in os.environ:
        name = os.environ[_INTERFACE]
        return name, _addresses().get(name, "")
    if world.nodes == 1:
        return "lo", "127.0.0.1"
    addresses = {n: a for n, a in _addresses().items() if not a.startswith("127.")}
    if not addresses:
        raise HpcsgdError(
            "this host has no IPv4 address that gloo could use",
            rank=world.rank,
            do=f"set {_INTERFACE} to the name of a network interface with an IPv4 address",
        )
    default = _default_address()
    return next(((n, a) for n, a in addresses.items() if a == default), next(iter(addresses.items())))


def _addresses() -> dict[str, str]:
    """The IPv4 address of each interface that has one."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                addresses[name] = socket.inet_ntoa(reply[20:24])
    return addresses


def _default_address() -> str:
    """The source address of packets on the default route; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])
