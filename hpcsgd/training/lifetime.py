"""Lifetimes of runs: which one trains a parameter, and the end of one that is left or dropped, not closed."""

from __future__ import annotations

import functools
import gc
import sys
import traceback
import weakref
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any, TypeVar

from torch.utils.weak import WeakTensorKeyDictionary

from hpcsgd.errors import BadOption
from hpcsgd.mpi.progress import Progress
from hpcsgd.mpi.world import World
from hpcsgd.registry import checked
from hpcsgd.strategies.base import Strategy
from hpcsgd.tensors.gradients import Named

if TYPE_CHECKING:
    from hpcsgd.training.run import Run

Start = TypeVar("Start", bound=Callable[..., None])
#: The lifetime of the run that trains a parameter, or did until it was dropped.
_trained_by: Any = WeakTensorKeyDictionary()
#: The lifetimes of the runs of a world, and of those split from it, which share its communication thread.
_runs_of: weakref.WeakKeyDictionary[Progress, weakref.WeakSet[Lifetime]] = weakref.WeakKeyDictionary()


def world_of_run(comm: Any, device: str) -> World:
    """Return the world of a new run: `comm`, or a duplicate of a world that has an open run; collective.

    Ranks follow each other's place in a run by that in its world. And what a run averages in the background
    comes in an order of its own, which another run of the world would meet in another order on each rank.
    """
    if not isinstance(comm, World):
        return World(comm, device=device)

    # A dropped run in a reference cycle is open until it is collected, which may be sooner on some ranks.
    if comm.size > 1 and any(comm.gather(has_open_run(comm), "the search for open runs")):
        return World(comm.all.comm, device=device, timeout=comm.timeout)
    return comm


def has_open_run(world: World) -> bool:
    """Return whether a run of this rank in the world, or in one split from it, is open."""
    return any(each.is_open for each in _runs_of.get(world.progress, ()))


class Lifetime:
    """Claims the trained parameters of a run, and leaves its world when the run is dropped.

    It has only a weak reference to the run. `owns_world`: the world is the run's own.

    Raises
    ------
    BadOption
        On all ranks, if another run that is open trains one of the parameters; not for a single rank.
    """

    def __init__(
        self, run: Run, strategy: Strategy, world: World, owns_world: bool, parameters: Named
    ) -> None:
        self._strategy = weakref.ref(strategy)
        self._world = world if owns_world else None
        self._open = True
        trainable = [(name, p) for name, p in parameters if p.requires_grad]
        if world.size > 1:
            self._check_unclaimed(trainable)
        for _, parameter in trainable:
            _trained_by[parameter] = self
        _runs_of.setdefault(world.progress, weakref.WeakSet()).add(self)
        weakref.finalize(run, self._drop).atexit = False

    def _check_unclaimed(self, trainable: Named) -> None:
        def claims() -> dict[Lifetime, str]:
            others = [(_trained_by.get(parameter), name) for name, parameter in reversed(trainable)]
            return {other: name for other, name in others if other is not None and other._open}

        if found := claims():
            _leave_after_last_exception(found)
            gc.collect()  # a dropped run may be part of a reference cycle
            for name in reversed(claims().values()):
                raise BadOption(
                    f"another Run trains the parameter {name!r}",
                    do="close the other Run first, as `with hpcsgd.Run(...) as run:` does also after an "
                    "exception (one that is kept keeps its Run); models that are trained together, as in a "
                    "GAN, need a Run each, or one Run of a module that holds all of them",
                    everywhere=True,
                )

    @property
    def is_open(self) -> bool:
        """Whether the run is neither closed, nor left, nor dropped."""
        return self._open

    def close(self) -> None:
        """Record that the run is being closed."""
        self._open, self._world = False, None

    def leave_after(self, error: BaseException | None) -> None:
        """Leave the run after an exception: remove its hooks, and notify ranks that wait for this one."""
        if self._open and error is not None and self._world is not None:
            self._world.leave_after(error)
        self._disconnect()

    def _drop(self) -> None:
        # Called by the garbage collector, anywhere and in any thread: it takes no lock and calls no MPI.
        if self._open and self._world is not None:
            self._world.leave("was dropped without close()")
        self._disconnect()

    def _disconnect(self) -> None:
        strategy = self._strategy()
        if self._open and strategy is not None:
            strategy.disconnect()
        self.close()


def _leave_after_last_exception(lifetimes: Container[Lifetime]) -> None:
    """Leave those runs that an uncaught exception has left in functions: interactive Python keeps these."""
    error = getattr(sys, "last_value", None)
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for value in frame.f_locals.values() if frame.f_code.co_name != "<module>" else ():
                lifetime = getattr(value, "__dict__", {}).get("_lifetime")
                if isinstance(lifetime, Lifetime) and lifetime in lifetimes:
                    lifetime.leave_after(error)
        error = error.__cause__ or error.__context__


def starting(start: Start) -> Start:
    """Decorate the start of a run: its options are checked before anything else is done.

    A run that is refused claims nothing, though its exception may keep it. A start makes many objects, none
    of which is garbage.
    """
    checked_start = checked(start)

    @functools.wraps(start)
    def wrapped(run: Run, *arguments: Any, **options: Any) -> None:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            checked_start(run, *arguments, **options)
            run._stepping.begin()
        except BaseException as error:
            if hasattr(run, "_lifetime"):
                run._lifetime.leave_after(error)
            raise
        finally:
            if was_enabled:
                gc.enable()

    return wrapped  # type: ignore[return-value]
