"""Reductions of several buckets at once, in one thread, each in small steps that never wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from hpcsgd.mpi.waiting import Waiter
from hpcsgd.tensors.group import Bucket

#: A flow yields None after a piece of work, or what must become true before it can go on.
Steps = Iterator[Callable[[], bool] | None]

_AHEAD = 2  # flows that may work before their turn


class Flow:
    """The reduction of one bucket.

    Messages of one kind leave in the order of the buckets on every rank: a flow never sends its message
    number i before the flow in front of it has. And it waits until the one before that has got its answer:
    two messages at a time fill the link, more would only delay the first.

    Parameters
    ----------
    front
        The flow of the bucket before, or None.
    number
        Its place in the order of all flows, the same on every rank.

    Attributes
    ----------
    sent, over
        How many messages have left, and have been answered.
    passed
        How many barriers of the node.
    blocked
        What somebody else must sum, when it is the flow's turn, before it can go on.
    only_decodes
        Whether nothing is left to be sent.
    done
        Whether it is at its end.
    """

    def __init__(self, front: Flow | None, number: int) -> None:
        self._front = front
        self.number = number
        self._steps: Steps = iter(())
        self._ready: Callable[[], bool] | None = None
        self.sent = self.over = self.passed = 0
        self.blocked: Bucket | None = None
        self.only_decodes = self.done = False

    def begin(self, steps: Steps) -> None:
        """What the flow does."""
        self._steps = steps

    def advance(self) -> bool:
        """Do one step; False where there is nothing to do but wait."""
        ready = self._ready
        if (ready is not None and not ready()) or self.done:
            return False
        try:
            self._ready = next(self._steps)
        except StopIteration:
            # Who still refers to this flow, as the one in front, keeps no memory alive.
            self.done, self._ready, self._front, self._steps = True, None, None, iter(())
        return True

    def may_send(self) -> bool:
        """Whether it is in order to send the next message."""
        front = self._front
        if front is None or front.done:
            return True
        before = front._front
        return front.sent > self.sent and (before is None or before.done or before.over > self.sent)

    def may_pass(self, barrier: int) -> bool:
        """Whether the flow in front has passed a barrier."""
        return self._front is None or self._front.done or self._front.passed > barrier


class Pipeline:
    """All flows of the ranks of a world, in one order; some work ahead and some still have to decode.

    Parameters
    ----------
    waiter
        How to wait.
    context
        What the flows of `take_turn` and `look_after` run in: the stream of a GPU.
    """

    def __init__(self, waiter: Waiter, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._waiter, self._context = waiter, context
        self._ahead: deque[Flow] = deque()
        self._behind: deque[Flow] = deque()
        self._last: Flow | None = None

    def add(self, what: Callable[[Flow], Steps]) -> Flow:
        """A new flow, which does `what`; its turn comes in the order of the calls."""
        self._last = flow = Flow(self._last, 0 if self._last is None else self._last.number + 1)
        flow.begin(what(flow))
        self._ahead.append(flow)
        return flow

    def take_turn(self, flow: Flow, what: str, sum_up: Callable[[Bucket], None]) -> None:
        """Bring the flow whose turn it is to its end, or to what can be done in the turn of the next.

        Parameters
        ----------
        flow
            The first one of those that work ahead.
        what
            The operation, for errors.
        sum_up
            Sums what the flow is blocked by; may wait, and call `look_after` meanwhile.
        """
        self._ahead.popleft()
        with self._context():
            while not flow.done:
                if flow.blocked is not None:
                    sum_up(flow.blocked)
                    flow.blocked = None
                if flow.only_decodes and self._ahead:
                    self._behind.append(flow)
                    return
                self._waiter.until(lambda: self._moved(flow), what)
            while not self._ahead and self._behind:
                self._work_behind()

    def complete(self, flow: Flow) -> None:
        """Decode what is left, up to a flow that has had its turn."""
        with self._context():
            while not flow.done:
                self._work_behind()

    def look_after(self) -> bool:
        """One step of a flow whose turn comes, or of one that has had it; False where there is none."""
        # A poll of a few microseconds: where ranks share cores, waiting takes time from those that work.
        for flow in list(self._ahead)[:_AHEAD]:
            if flow.advance():
                return True
        return self._work_behind()

    def _moved(self, flow: Flow) -> bool:
        while not flow.advance():
            if flow.blocked is not None:
                return True
            if not self.look_after():
                return False
        return True

    def _work_behind(self) -> bool:
        while self._behind and self._behind[0].done:
            self._behind.popleft()
        return bool(self._behind) and self._behind[0].advance()
