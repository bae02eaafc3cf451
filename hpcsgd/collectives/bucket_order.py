"""The order of the messages of compressed buckets, of which several are reduced at a time."""

from __future__ import annotations

from hpcsgd.mpi.tasks import Turn


class BucketOrder(Turn):
    """The place of a bucket's reduction among those of its world.

    Messages of one kind are sent in the order of the buckets on every rank: a reduction never sends its
    message number i before its predecessor has. It also waits until that message of the reduction before its
    predecessor is completed: two messages at a time fill the link, more would only delay the first.

    Parameters
    ----------
    predecessor
        That of the preceding bucket, or None.

    Attributes
    ----------
    number
        Position in the order of all reductions, equal on all ranks.
    sent, completed
        Number of messages that have been sent, and whose result has been received.
    barriers_passed
        Number of barriers of the node that the reduction has passed.
    """

    def __init__(self, predecessor: BucketOrder | None) -> None:
        super().__init__()
        self._predecessor = predecessor
        self.number: int = 0 if predecessor is None else predecessor.number + 1
        self.sent = self.completed = self.barriers_passed = 0
        self._ended = False

    def end(self) -> None:
        """Record that the bucket is reduced."""
        # A reference to this one, as a predecessor, must not keep all before it alive.
        self._ended, self._predecessor = True, None

    def may_send(self) -> bool:
        """Return whether the order of messages allows the next one to be sent."""
        predecessor = self._predecessor
        if predecessor is None or predecessor._ended:
            return True
        earlier = predecessor._predecessor
        may_follow = earlier is None or earlier._ended or earlier.completed > self.sent
        return predecessor.sent > self.sent and may_follow

    def may_pass(self, barrier: int) -> bool:
        """Return whether the predecessor has passed a barrier."""
        predecessor = self._predecessor
        return predecessor is None or predecessor._ended or predecessor.barriers_passed > barrier
