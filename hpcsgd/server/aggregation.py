"""When a push is counted in, and when it is answered."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hpcsgd.server import summed_pushes
from hpcsgd.server.protocol import Head, Kind, State
from hpcsgd.server.session import Client
from hpcsgd.server.shard import Push, Shard
from hpcsgd.server.update_rules import Terms

#: Called with the pushes of an update before it is made: what it keeps survives the server.
Record = Callable[[Shard, list[Push], Terms], None]


class Counting:
    """Counts pushes in, one by one or together.

    Parameters
    ----------
    clients
        All that were ever here, by name.
    together
        Whether an update waits for the pushes of all clients that count, and is made by all of them at once.
    max_staleness
        How many pushes a client may be ahead of the slowest one that counts: it is not answered before.
        None: any number.
    grant
        Of so many steps that a client asks for, how many it may take; and how many all have begun.
    record
        See `Record`.

    Attributes
    ----------
    staleness
        How often a push was behind by so many updates of others.
    left_out
        How many pushes were of no use, for nobody had waited for them.
    """

    def __init__(
        self,
        clients: dict[str, Client],
        together: bool,
        max_staleness: int | None,
        grant: Callable[[Client, int], tuple[int, int]],
        record: Record,
    ) -> None:
        self._clients, self._together, self._max_staleness = clients, together, max_staleness
        self._grant, self._record = grant, record
        self.staleness: Counter[int] = Counter()
        self.left_out = 0

    def pull(self, client: Client, shard: Shard) -> None:
        """Tell a client the values, if there are any."""
        answer = Head(Kind.REPLY, shard.index, State.EMPTY)
        if shard.centre is not None:
            self.enter(client, shard)
            answer = Head(Kind.REPLY, shard.index, version=shard.version, nbytes=shard.nbytes)
        self._answer(client, shard, answer)

    def push(self, client: Client, shard: Shard, head: Head, values: np.ndarray) -> None:
        """Count a push in, now or when its time has come."""
        self.enter(client, shard)
        nbytes = shard.nbytes if head.kind is Kind.PUSHPULL else 0
        answer = Head(Kind.REPLY, shard.index, round=head.round, steps=head.steps, nbytes=nbytes)
        if head.round <= shard.rounds.get(client.name, 0):
            pass  # it has come before, and the answer was lost
        elif self._too_late(client, shard, head):
            self._leave_out(client, shard, head.round)
        else:
            shard.left_out.discard(client.name)
            client.behind[shard.index] = max(0, shard.version - head.version)
            if summed_pushes.may_say(shard, client.name, head, len(self._clients)):
                push = Push(client.name, head.round, head.weight, values, head.terms)
                shard.waiting[client.name] = push
            else:
                answer = summed_pushes.again(shard, head.round, len(self._counting(shard)))
        if client.name in shard.left_out:
            answer = replace(answer, state=State.LATE)
        client.owed[shard.index] = answer
        self.go_on(shard)

    def _leave_out(self, client: Client, shard: Shard, number: int) -> None:
        self.left_out += 1
        client.left_out += 1
        shard.rounds[client.name] = number
        shard.left_out.add(client.name)

    def go_on(self, shard: Shard) -> None:
        """Do what need not wait any longer."""
        if not self._together:
            for name in list(shard.waiting):
                self._count_in(shard, [shard.waiting[name]])
        elif shard.waiting and summed_pushes.is_complete(
            shard, {client.name for client in self._counting(shard)}
        ):
            if summed_pushes.sum_of(shard) is not None:
                self._go_on_adding(shard)
            else:
                # In the order of names: the bits do not depend on who came first.
                self._count_in(shard, [shard.waiting[name] for name in sorted(shard.waiting)])
        self._pay(shard)

    def _go_on_adding(self, shard: Shard) -> None:
        """All have said their parts of a sum."""
        answers, body = summed_pushes.go_on(shard)
        for name, answer in answers.items():
            client = self._clients[name]
            del shard.waiting[name], client.owed[shard.index]
            if client.link is not None:
                client.link.send(answer, body, 0)
        if not answers:
            buffers = {name: self._clients[name].buffer(shard) for name in shard.waiting}
            self._count_in(shard, summed_pushes.add_up(shard, buffers))
            for name in list(shard.waiting):  # who has come meanwhile begins with the new values
                client, push = self._clients[name], shard.waiting.pop(name)
                self._leave_out(client, shard, push.number)
                client.owed[shard.index] = replace(client.owed[shard.index], state=State.LATE)

    def _counting(self, shard: Shard) -> list[Client]:
        """The clients whose pushes of a shard are waited for."""
        return [client for client in self._clients.values() if client.counts and shard.index in client.has]

    def enter(self, client: Client, shard: Shard) -> None:
        """A client has the values of a shard from now on; it is as far as the foremost of the others."""
        if shard.index not in client.has:
            client.has.add(shard.index)
            shard.clocks.setdefault(client.name, self._ahead(client, shard))

    def _ahead(self, client: Client, shard: Shard) -> int:
        """Where the foremost of the other clients is."""
        # Of all that were ever here: what those have pushed who are gone makes a push no less late.
        return max((clock for name, clock in shard.clocks.items() if name != client.name), default=0)

    def _too_late(self, client: Client, shard: Shard, head: Head) -> bool:
        """Whether the others have gone on without this push, and it is of no use."""
        if self._together:
            left_behind = head.version != shard.version
        elif self._max_staleness is None:
            left_behind = False
        else:
            ahead = self._ahead(client, shard)
            left_behind = ahead > shard.clocks[client.name] + self._max_staleness + 1
            if left_behind:  # it goes on from where they are: nobody waits until it has made up for it
                shard.clocks[client.name] = ahead
        return left_behind and shard.rule.takes_gradients

    def _count_in(self, shard: Shard, pushes: list[Push]) -> None:
        for push in pushes:
            del shard.waiting[push.client]
        clients = max(len(pushes), len(self._counting(shard)))
        options = self._clients[pushes[0].client].options
        terms = Terms([push.weight for push in pushes], clients, options)
        self._record(shard, pushes, terms)
        shard.count_in(pushes, terms)
        for push in pushes:
            client = self._clients[push.client]
            behind = client.behind.pop(shard.index)
            client.staleness[behind] += 1
            self.staleness[behind] += 1

    def _pay(self, shard: Shard) -> None:
        """Answer what has been counted in, unless a client is too far ahead."""
        bounded = not self._together and self._max_staleness is not None
        slowest = min((shard.clocks[client.name] for client in self._counting(shard)), default=math.inf)
        for client in self._clients.values():
            if shard.index not in client.owed or client.name in shard.waiting:
                continue
            if bounded and shard.clocks[client.name] - slowest > (self._max_staleness or 0):
                continue
            answer = client.owed.pop(shard.index)
            self._answer(client, shard, replace(answer, version=shard.version))

    def _answer(self, client: Client, shard: Shard, answer: Head) -> None:
        if client.link is None:
            return
        body, code = client.buffer(shard), None
        if answer.nbytes and (shard.rule.takes_gradients or not answer.round):
            shard.read(body)
        if answer.nbytes and answer.round and shard.codes is not None:
            code = shard.codes.answer(client.name, answer, shard.view(body))
        if code is not None:
            body, answer = code, replace(answer, nbytes=code.nbytes)
        if answer.steps:
            steps, begun = self._grant(client, answer.steps)
            answer = replace(answer, steps=steps, begun=begun)
        client.link.send(answer, body if answer.nbytes else None, shard.nbytes if code is not None else None)
