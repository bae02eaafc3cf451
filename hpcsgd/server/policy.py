"""Settings of parameter servers."""

from __future__ import annotations

from typing import NamedTuple

from hpcsgd.registry.limits import ElasticAlpha, Natural, ServerMode, Timeout


class Policy(NamedTuple):
    """Settings that are equal on all servers of a model."""

    #: "sync": one optimizer step with the mean gradient of all awaited clients. "async": one with
    #: each push. "elastic": elastic averaging of the pushed models and the centre.
    mode: ServerMode = "sync"
    alpha: ElasticAlpha | None = None  # coefficient of elastic averaging, see `update_rules.ElasticRule`
    #: See `aggregation.PushAggregator`; with 0 every mode waits for all pushes and applies them at once.
    max_staleness: Natural | None = None
    #: Seconds without a message after which a client is no longer awaited, until its next one.
    lease: Timeout = 10.0

    @property
    def synchronous(self) -> bool:
        """Whether the pushes of all awaited clients are applied at once."""
        return self.mode == "sync" or self.max_staleness == 0
