"""Stall detection: queries every rank for its state; unresponsive ranks are inspected by another process on
their node."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hpcsgd.diagnostics import procfs
from hpcsgd.diagnostics.activity import ActivityRecord, ProcessInfo, ProcessView
from hpcsgd.diagnostics.inspection import inspect
from hpcsgd.errors import format_ranks
from hpcsgd.mpi.control_messages import ControlChannel
from hpcsgd.mpi.rank_calls import RankCalls, certain_mismatch
from hpcsgd.mpi.stall_report import RankState, blocking_ranks, describe_activity, is_stalled, wait_lines
from hpcsgd.mpi.waiting import DeadlineWaiter, Explanation

_REPORT_INTERVAL = 0.9  # of the time waited: another rank reports a stall only after so long
_FIRST_QUERIED = 4  # ranks that are queried at once for the lowest responsive one; then as many times more
_NOTIFY_INTERVAL = 5.0  # seconds
#: Seconds for which a rank waits for the report of another: in all, without an answer, and between requests.
_LONGEST_REPORT, _LONGEST_SILENCE, _REPORT_PAUSE = 60.0, 10.0, 0.1
_MOST_DETAILED = 3  # ranks
_INDENT = " " * 12  # of the "got" lines of an error
_NONE = Explanation()
_MOST_OBSERVERS = 2  # ranks of a node that are queried about a silent one


class StallDetector:
    """Records this rank's activity for others, and reports that of other ranks when a wait for them lasts.

    It has an mpi4py communicator that is used for nothing else.

    Attributes
    ----------
    channel
        Messages between the ranks.
    calls
        The place of this rank in its program.
    """

    def __init__(self, comm: Any, waiter: DeadlineWaiter, activity: ActivityRecord) -> None:
        self._rank, self._waiter, self._activity = comm.rank, waiter, activity
        self._size = comm.size
        self.channel = ControlChannel(comm, self._reply)
        self.calls = RankCalls()
        self._processes: list[ProcessInfo] = []
        self._views: dict[int, ProcessView] = {}
        self._killed = procfs.killed_for_memory()
        self._buddy: int | None = None
        self._notified_at, self._notifications_sent = 0.0, 0
        #: By action, the rank that this one has chosen last to report, and when.
        self._reporters: dict[str, tuple[int, float]] = {}
        self._arbitrating, self._reporting = threading.Lock(), threading.Lock()
        self._reported = -math.inf, _NONE

    def connect(self, processes: list[ProcessInfo]) -> None:
        """Register the processes of all ranks, and map the activity records of those on this machine."""
        self._processes = processes
        for rank, process in enumerate(processes):
            with contextlib.suppress(OSError):
                self._views[rank] = ProcessView(process)
        self._buddy = self._buddy_of(self._rank)

    def _buddy_of(self, rank: int) -> int | None:
        """The next rank on another machine, which receives a rank's activity in case its machine fails."""
        ring = [*range(rank + 1, len(self._processes)), *range(rank)]
        return next((r for r in ring if self._processes[r].host != self._processes[rank].host), None)

    def poll(self) -> None:
        """Exchange control messages: answer requests, and send this rank's activity to its buddy when due."""
        self.channel.poll()
        if self._buddy is not None and time.monotonic() - self._notified_at > _NOTIFY_INTERVAL:
            self._notified_at, self._notifications_sent = time.monotonic(), self._notifications_sent + 1
            self.channel.notify(self._buddy, (self._notifications_sent, self._activity.last()))

    def close(self, gather: Callable[[int], list[int]]) -> None:
        """Receive all notifications, for an unreceived message could reach another world; collective."""
        if self._buddy is None:
            return  # on all ranks, which share one machine
        self._buddy = None
        sent = gather(self._notifications_sent)
        expected = {r: n for r, n in enumerate(sent) if n and self._buddy_of(r) == self._rank}
        received = self.channel.notifications

        def complete() -> bool:
            self.channel.poll()
            return all(r in received and received[r][1][0] == n for r, n in expected.items())

        self._waiter.until(complete, "the last notifications of other ranks", lambda: expected)

    def release(self) -> None:
        """Unmap the activity records of other processes."""
        self._views.clear()

    def place(self, rank: int) -> RankCalls | None:
        """Return the place of another rank in its program; None where it does not answer."""
        state = self.channel.request([rank], ("state", None)).get(rank)
        return state.calls if state else None

    def explain(self, seconds: float) -> Explanation:
        """Return the state of each rank, after a wait of `seconds`, and whether another rank prints it.

        One rank finds it out, and the others get it there: each can print it, should that one end before.
        """
        reporter, _ = self._reporter("explain", seconds)
        if reporter != self._rank and (found := self._report_of(reporter, seconds)).report:
            return found._replace(elsewhere=True)
        with self._reporting:  # both threads may come here, and either's error be the one that is printed
            if not self._report(seconds).report:
                self._reported = time.monotonic(), self._make_report()
            return self._reported[1]

    def _report(self, seconds: float) -> Explanation:
        """The report of this rank, if it has made one in the last `seconds`."""
        made, found = self._reported
        return found if time.monotonic() - made < _REPORT_INTERVAL * seconds else _NONE

    def _report_of(self, rank: int, seconds: float) -> Explanation:
        """The report of another rank, for which this one waits; none if it makes none, for it has ended."""
        began = answered = time.monotonic()
        while (now := time.monotonic()) - began < _LONGEST_REPORT and now - answered < _LONGEST_SILENCE:
            if rank in self._views and not procfs.is_alive(self._views[rank].info.pid):
                break
            reply = self.channel.request([rank], ("report", rank, seconds))
            if rank in reply and reply[rank].report:
                return reply[rank]  # type: ignore[no-any-return]
            answered = now if rank in reply else answered
            time.sleep(_REPORT_PAUSE)
        return _NONE

    def _make_report(self) -> Explanation:
        states = self._states()
        blocking = blocking_ranks(self._rank, states, self._size)
        # Under load more ranks may be silent than those that are stopped, which have moved last.
        blocking.sort(key=lambda rank: states[rank].last.ago if rank in states else math.inf, reverse=True)
        lines = []
        for rank in blocking[:_MOST_DETAILED]:
            lines += [self._line(rank, states), *self._details(rank, True, states)]
        if blocking[_MOST_DETAILED:]:
            lines.append(f"{format_ranks(blocking[_MOST_DETAILED:])} did not wait either")
        text = ("\n" + _INDENT).join([*wait_lines(states, blocking), *lines])
        return Explanation(text, tuple(sorted(blocking)))

    def warn(self, seconds: float) -> bool:
        """Print a warning on one rank that all have waited; False where the blocking ranks are active."""
        if self._reporter("warn", seconds) != (self._rank, True):
            return True
        states = self._states()
        blocking = blocking_ranks(self._rank, states, self._size)
        if not is_stalled(blocking, states, seconds / 2):
            return False
        limit = self._waiter.timeout
        lines = [
            f"hpcsgd: {seconds:.0f} s without progress; after {limit:g} s (--timeout, "
            "HPCSGD_TIMEOUT) the job ends:"
        ]
        lines += wait_lines(states, blocking)
        for rank in blocking[:1]:
            lines += [self._line(rank, states), *self._details(rank, False, states)]
        print("\n  ".join(lines), file=sys.stderr, flush=True)
        return True

    def compare(self, seconds: float) -> None:
        """Raise where ranks are at places in their programs that never meet, after a wait of `seconds`.

        Raises
        ------
        Disagreement
            With the ranks and their calls.
        """
        if self._reporter("compare", seconds) != (self._rank, True):
            return
        states = self._states()
        places = {rank: state.calls for rank, state in states.items() if state.calls is not None}
        awaited = {rank: state.wait.ranks for rank, state in states.items() if state.wait}
        error = certain_mismatch(places, list(range(self._size)), awaited)
        if error is not None:
            raise error

    def is_busy(self) -> bool:
        """Return whether another rank is alive and busy."""
        return any(state.last.busy for rank, state in self._states().items() if rank != self._rank)

    def _reporter(self, action: str, seconds: float) -> tuple[int, bool]:
        """The rank that reports, and whether it has been chosen now, and not in the last `seconds`.

        The lowest responsive rank chooses.
        """
        queried = 0
        while queried < self._rank:
            some = range(queried, min(_FIRST_QUERIED * (queried + 1), self._rank))
            responsive = self.channel.request(some, ("state", None))
            if responsive:
                arbiter = min(responsive)
                reply = self.channel.request([arbiter], ("arbitrate", self._rank, action, seconds))
                return reply.get(arbiter) or (self._rank, True)
            queried = some.stop
        return self._arbitrate(self._rank, action, seconds)

    def _arbitrate(self, rank: int, action: str, seconds: float) -> tuple[int, bool]:
        with self._arbitrating:
            now = time.monotonic()
            reporter, chosen = self._reporters.get(action, (rank, -math.inf))
            if now - chosen < _REPORT_INTERVAL * seconds:
                return reporter, False
            self._reporters[action] = rank, now
            return rank, True

    def _states(self) -> dict[int, RankState]:
        replies = self.channel.request(range(self._size), ("state", None))
        states = {self._rank: self._own_state(), **replies}
        for rank in set(range(self._size)) - set(states):
            state = self._observe(rank, ("state", rank), states)
            if state is not None:
                states[rank] = state
        return states

    def _observe(self, rank: int, request: tuple[Any, ...], states: Mapping[int, RankState]) -> Any:
        """The reply of a rank that can inspect `rank`: this one, `rank` itself, or another on its machine."""
        if rank in self._views:
            return self._reply(request)
        if not self._processes:
            return None
        responsive = [r for r, state in states.items() if state.waits is not None]
        observers = [r for r in responsive if self._processes[r].host == self._processes[rank].host]
        queried = sorted(observers, key=lambda r: r != rank)[:_MOST_OBSERVERS]
        replies = self.channel.request(queried, request)
        observed = next((reply for reply in replies.values() if reply is not None), None)
        return self._last_notified(rank) if observed is None and request[0] == "state" else observed

    def _last_notified(self, rank: int) -> RankState | None:
        """The last state that a silent rank has sent to its buddy."""
        buddy = self._buddy_of(rank)
        if buddy is None:
            return None
        if buddy == self._rank:
            return self._reply(("notified", rank))  # type: ignore[no-any-return]
        return self.channel.request([buddy], ("notified", rank)).get(buddy)

    def _reply(self, request: tuple[Any, ...]) -> Any:
        kind, rank, *options = request
        if rank is None:
            return self._own_state()
        if kind == "arbitrate":
            return self._arbitrate(rank, *options)
        if kind == "report":
            return self._report(*options)
        if kind == "notified":
            if rank not in self.channel.notifications:
                return None
            when, (_, last) = self.channel.notifications[rank]
            return RankState(replace(last, ago=last.ago + time.monotonic() - when), None)
        view = self._views.get(rank)
        if view is None:
            return None
        if kind != "state":
            stacks, silent = options
            return inspect(view.info.pid, view, stacks=stacks, silent=silent, killed_before=self._killed)
        last = view.last()
        return RankState(last if procfs.is_alive(view.info.pid) else replace(last, busy=""), None)

    def _own_state(self) -> RankState:
        return RankState(self._activity.last(), self._waiter.pending(), self.calls.copy())

    def _details(self, rank: int, stacks: bool, states: Mapping[int, RankState]) -> list[str]:
        silent = rank not in states or states[rank].waits is None
        request = ("details", rank, stacks, silent)
        # A rank that answers reads its own stacks: read by a signal, those of running threads can end it.
        own = {} if silent else self.channel.request([rank], request)
        lines = own.get(rank) or self._observe(rank, request, states)
        return [f"  {line}" for line in lines or ["no rank on its machine answers"]]

    def _line(self, rank: int, states: Mapping[int, RankState]) -> str:
        where = ""
        if self._processes:
            where = f" ({self._processes[rank].host}, process {self._processes[rank].pid})"
        return f"{format_ranks(rank)}{where} {describe_activity(rank, states)}"
