"""Workloads and conditions of the studies with a launch per link."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpcsgd import registry
from hpcsgd.commands.bench.studies.runner import settings_of
from hpcsgd.commands.train.settings import Settings

#: The label of a link that costs no time.
FAST = "fast"
_FACTOR = 4  # gradient time of a slow rank over that of the others


@dataclass(frozen=True)
class Workload:
    """Model, data and hyperparameters of a study, equal for all methods; see `options.StudyOptions`."""

    data: str
    model: str
    optimizer: str
    learning_rate: float
    warmup: float
    clip: float | None
    batch: int
    epochs: float
    evaluate_every: float
    target: float
    base_ms: float


WORKLOADS = {
    "digits": Workload(
        data="digits",
        model="2nn:width=400",
        optimizer="sgd:momentum=0.9",
        learning_rate=0.03,
        warmup=0.0,
        clip=None,
        batch=32,
        epochs=10.0,
        evaluate_every=1.25,
        target=0.3,
        base_ms=20.0,
    ),
    "text": Workload(
        data="text:limit=0.217,context=32",
        model="gpt:layers=1,width=160",
        optimizer="sgd:momentum=0.9",
        learning_rate=0.05,
        warmup=0.1,
        clip=1.0,
        batch=8,
        epochs=0.5,
        evaluate_every=0.0625,
        target=2.95,
        base_ms=50.0,
    ),
}


#: Workloads for eight workers instead of four: an epoch has half as many steps.
EIGHT_WORKER_WORKLOADS = {
    "digits": replace(WORKLOADS["digits"], epochs=22.5, evaluate_every=2.5),
    "text": replace(WORKLOADS["text"], epochs=4 / 3, evaluate_every=1 / 6),
}


@dataclass(frozen=True)
class StudyCondition:
    """A condition under which methods are compared: data set, label of the link, number of slow ranks."""

    data: str
    link: str
    slow_ranks: int

    def __str__(self) -> str:
        return f"{self.data}, {self.cluster}"

    @property
    def cluster(self) -> str:
        """Link and slow ranks as text."""
        count = self.slow_ranks
        ranks = {0: "equal ranks", 1: "one slow rank"}.get(count, f"{count} slow ranks")
        return f"{self.link}, {ranks}"

    @property
    def column(self) -> tuple[bool, str, int]:
        """Sort key of the panels in a row: the fast link first."""
        return self.link != FAST, self.link, self.slow_ranks


def plan_run(workload: Workload, condition: StudyCondition, seed: int, method: str) -> tuple[str, Settings]:
    """The name and the settings of the run of `method` under `condition` with `seed`."""
    delays = f"seconds={workload.base_ms / 1000:g}"
    settings = settings_of(
        workload,
        # Where servers take a step with each group's gradient, the rate is divided by the number of groups.
        learning_rate=workload.learning_rate / _steps_per_iteration(method),
        strategy=method,
        delays=f"{_delay_model(condition.slow_ranks)}{delays}",
        seed=seed,
        schedule="constant",
        checkpoint_every=0.0,
        threads=1,
    )
    speeds = "slow" if condition.slow_ranks else "equal"
    return f"{condition.data}-{condition.link}-{speeds}-{seed}-{method}", settings


def _steps_per_iteration(method: str) -> int:
    """Number of optimizer steps while each group computes one gradient."""
    name, options = registry.parse(method)
    return int(options.get("groups", 1)) if name == "ps" and options.get("mode") == "async" else 1


def _delay_model(slow_ranks: int) -> str:
    if not slow_ranks:
        return "constant:"
    count = f"count={slow_ranks}," if slow_ranks > 1 else ""
    return f"slow:factor={_FACTOR},{count}"
