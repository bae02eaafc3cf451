"""Who keeps the others waiting: found by asking every rank, and the neighbours of those that are silent."""

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
from hpcsgd.diagnostics.activity import Card, Neighbour, Status
from hpcsgd.diagnostics.stack_dump import short
from hpcsgd.errors import in_words
from hpcsgd.mpi.control_messages import Mail
from hpcsgd.mpi.stall_report import Standing, blamed, progress_of, stand_still, waits
from hpcsgd.mpi.waiting import Waiter

_STALL = 0.9  # of what a rank has waited: others tell of another stall only after so long
_AT_ONCE = 4  # ranks that are asked at first whether they are awake; then as many times more
_TELL_EVERY = 5.0  # seconds
_IN_DETAIL = 3  # ranks
_INDENT = " " * 12  # of what an error has got
_STACKS_OF = 2  # children
_MANY = 2  # mates that are asked about a silent rank


class Lookout:
    """Knows what this rank does, and finds out what others do when they are waited for.

    Parameters
    ----------
    comm
        An mpi4py communicator used for nothing else.
    waiter, status
        What this rank waits for, and does.
    """

    def __init__(self, comm: Any, waiter: Waiter, status: Status) -> None:
        self._rank, self._waiter, self._status = comm.rank, waiter, status
        self._size = comm.size
        self._mail = Mail(comm, self._answer)
        self._cards: list[Card] = []
        self._neighbours: dict[int, Neighbour] = {}
        self._killed = procfs.killed_for_memory()
        self._confidant: int | None = None
        self._told_at, self._told = 0.0, 0
        self._firsts: dict[str, float] = {}
        self._judging = threading.Lock()
        waiter.explain, waiter.warn = self.explain, self.warn

    def meet(self, cards: list[Card]) -> None:
        """Know the processes of all ranks, and look into those that are on this machine."""
        self._cards = cards
        for rank, card in enumerate(cards):
            with contextlib.suppress(OSError):
                self._neighbours[rank] = Neighbour(card)
        self._confidant = self._confidant_of(self._rank)

    def _confidant_of(self, rank: int) -> int | None:
        """Who is told what a rank does, in case its whole machine falls silent: the next one elsewhere."""
        ring = [*range(rank + 1, len(self._cards)), *range(rank)]
        return next((r for r in ring if self._cards[r].host != self._cards[rank].host), None)

    def look_around(self) -> None:
        """Hear what other ranks ask and tell, and tell what is to be told."""
        self._mail.poll()
        if self._confidant is not None and time.monotonic() - self._told_at > _TELL_EVERY:
            self._told_at, self._told = time.monotonic(), self._told + 1
            self._mail.tell(self._confidant, (self._told, self._status.moved()))

    def close(self, gather: Callable[[int], list[int]]) -> None:
        """Hear the last of what others tell: a message left behind could reach another world; collective.

        Parameters
        ----------
        gather
            Brings the number of every rank to every rank.
        """
        if self._confidant is None:
            return  # on all ranks, which share one machine
        self._confidant = None
        told = gather(self._told)
        tell_me = {r: n for r, n in enumerate(told) if n and self._confidant_of(r) == self._rank}
        heard = self._mail.news

        def through() -> bool:
            self._mail.poll()
            return all(r in heard and heard[r][1][0] == n for r, n in tell_me.items())

        self._waiter.until(through, "the last news of other ranks", lambda: tell_me)

    def explain(self, seconds: float) -> str | None:
        """What each rank does, when this one has waited for so long; None where another rank tells."""
        if not self._is_first("explain", seconds):
            return None
        known = self._standings()
        culprits = blamed(self._rank, known, self._size)
        lines = []
        for rank in culprits[:_IN_DETAIL]:
            lines += [self._line(rank, known), *self._details(rank, True, known)]
        if culprits[_IN_DETAIL:]:
            lines.append(f"nor did {in_words(culprits[_IN_DETAIL:])} wait")
        return ("\n" + _INDENT).join([*waits(known, culprits), *lines])

    def warn(self, seconds: float) -> bool:
        """Say on one rank that all have waited for so long; False where those waited for do move."""
        if not self._is_first("warn", seconds):
            return True
        known = self._standings()
        culprits = blamed(self._rank, known, self._size)
        if not stand_still(culprits, known, seconds / 2):
            return False
        limit = self._waiter.timeout
        lines = [f"hpcsgd: {seconds:.0f} s without progress; {limit:g} s end the job:"]
        lines += waits(known, culprits)
        for rank in culprits[:1]:
            lines += [self._line(rank, known), *self._details(rank, False, known)]
        print("\n  ".join(lines), file=sys.stderr, flush=True)
        return True

    def _is_first(self, to: str, seconds: float) -> bool:
        """Whether no other rank has been first in these last seconds, which the first rank awake decides."""
        asked = 0
        while asked < self._rank:
            some = range(asked, min(_AT_ONCE * (asked + 1), self._rank))
            awake = self._mail.ask(some, ("standing", None))
            if awake:
                judge = min(awake)
                return bool(self._mail.ask([judge], ("first", self._rank, to, seconds)).get(judge, True))
            asked = some.stop
        return self._judge(to, seconds)

    def _judge(self, to: str, seconds: float) -> bool:
        with self._judging:
            now = time.monotonic()
            if now - self._firsts.get(to, -math.inf) < _STALL * seconds:
                return False
            self._firsts[to] = now
            return True

    def _standings(self) -> dict[int, Standing]:
        known = {self._rank: self._own(), **self._mail.ask(range(self._size), ("standing", None))}
        for rank in set(range(self._size)) - set(known):
            standing = self._about(rank, ("standing", rank), known)
            if standing is not None:
                known[rank] = standing
        return known

    def _about(self, rank: int, question: tuple[Any, ...], known: Mapping[int, Standing]) -> Any:
        """The answer of who can see that rank: this one, itself, or another on its machine."""
        if rank in self._neighbours:
            return self._answer(question)
        if not self._cards:
            return None
        awake = [r for r, s in known.items() if s.waiting is not None]
        mates = [r for r in awake if self._cards[r].host == self._cards[rank].host]
        answers = self._mail.ask(sorted(mates, key=lambda r: r != rank)[:_MANY], question)
        seen = next((answer for answer in answers.values() if answer is not None), None)
        return self._heard(rank) if seen is None and question[0] == "standing" else seen

    def _heard(self, rank: int) -> Standing | None:
        """What a silent rank told when it was not."""
        confidant = self._confidant_of(rank)
        if confidant is None:
            return None
        if confidant == self._rank:
            return self._answer(("heard", rank))  # type: ignore[no-any-return]
        return self._mail.ask([confidant], ("heard", rank)).get(confidant)

    def _answer(self, question: tuple[Any, ...]) -> Any:
        kind, rank, *options = question
        if rank is None:
            return self._own()
        if kind == "first":
            return self._judge(*options)
        if kind == "heard":
            if rank not in self._mail.news:
                return None
            when, (_, moved) = self._mail.news[rank]
            return Standing(replace(moved, ago=moved.ago + time.monotonic() - when), None)
        neighbour = self._neighbours.get(rank)
        if neighbour is None:
            return None
        return Standing(neighbour.moved(), None) if kind == "standing" else self._look_at(neighbour, *options)

    def _own(self) -> Standing:
        return Standing(self._status.moved(), self._waiter.waits())

    def _details(self, rank: int, stacks: bool, known: Mapping[int, Standing]) -> list[str]:
        silent = rank not in known or known[rank].waiting is None
        lines = self._about(rank, ("details", rank, stacks, silent), known)
        return [f"  {line}" for line in lines or ["nobody on its machine answers"]]

    def _look_at(self, neighbour: Neighbour, stacks: bool, silent: bool) -> list[str]:
        pid = neighbour.card.pid
        if not procfs.is_alive(pid) or neighbour.card.memory_of(pid) is None:
            killed = procfs.killed_for_memory() - self._killed
            why = f"; the kernel has killed {killed} processes there for lack of memory" * (killed > 0)
            return [f"it is gone: it has ended or was killed{why}"]
        children = procfs.children(pid)
        held = ", in native code that keeps Python's lock" * (silent and procfs.can_run(pid))
        lines = [f"it {procfs.condition(pid)}{held}", procfs.memory(pid)]
        lines += procfs.list_of_children(children)
        for process in [pid, *children[:_STACKS_OF]] if stacks else []:
            if procfs.can_run(process):
                lines += short(neighbour.stacks(process), "" if process == pid else f" of child {process}")
        return lines

    def _line(self, rank: int, known: Mapping[int, Standing]) -> str:
        where = ""
        if self._cards:
            where = f" ({self._cards[rank].host}, process {self._cards[rank].pid})"
        return f"{in_words(rank)}{where} {progress_of(rank, known)}"
