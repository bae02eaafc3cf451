"""Baselines: `MPI_Allreduce`, and gloo through torch.distributed."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hpcsgd.commands.bench.devices import set_variable, synchronize
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.server.listening import InterfaceAddress, interface_addresses

_INTERFACE = "GLOO_SOCKET_IFNAME"


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
    name, address = _interface(world)
    deadline = timedelta(seconds=world.timeout)
    with set_variable(_INTERFACE, name):
        try:
            store = _store(world, address, deadline)
            dist.init_process_group("gloo", None, deadline, world.size, world.rank, store)
            yield
            world.control.barrier("the end of the gloo benchmark")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _store(world: World, address: str, deadline: timedelta) -> TCPStore:
    """The rendezvous store, served by rank 0 on a free port."""
    if world.rank == 0:
        store = TCPStore(address, 0, None, True, deadline, wait_for_workers=False)
        world.gather((address, store.port), "the address of gloo's rendezvous store")
        return store
    host, port = world.gather(None, "the address of gloo's rendezvous store")[0]
    return TCPStore(host, port, None, False, deadline)


def _interface(world: World) -> InterfaceAddress:
    """Name and IPv4 address of the interface on which this rank listens."""
    known = [each for each in interface_addresses() if ":" not in each.address]
    if _INTERFACE in os.environ:
        name = os.environ[_INTERFACE]
        return next((each for each in known if each.interface == name), InterfaceAddress(name, ""))
    if world.nodes == 1:
        return InterfaceAddress("lo", "127.0.0.1")
    reachable = [each for each in known if not each.address.startswith("127.")]
    if not reachable:
        raise HpcsgdError(
            "this host has no IPv4 address that gloo could use",
            rank=world.rank,
            do=f"set {_INTERFACE} to the name of a network interface with an IPv4 address",
        )
    default = _default_address()
    return next((each for each in reachable if each.address == default), reachable[0])


def _default_address() -> str:
    """The source address of packets on the default route; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])
