"""What studies over several links train, and in which settings they do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from hpcsgd import registry
from hpcsgd.commands.train.settings import FIELDS, Settings, validate

#: The label of a link that nobody waits for.
FAST = "fast"
_FACTOR = 4  # how many times as long gradients of a slow rank take


@dataclass(frozen=True)
class Workload:
    """What is trained, and how, by all methods alike.

    Attributes
    ----------
    data, model, optimizer, learning_rate, warmup, clip, batch, epochs, evaluate_every
        As of `hpcsgd train`; after the warm-up the learning rate is constant. Where servers take a step with
        each group's gradient, it is divided by the number of groups.
    target
        Test loss.
    base_ms
        What a gradient takes, simulated, in milliseconds; of a slow rank four times that.
    """

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


#: For twice as many workers: an epoch has half as many steps.
WIDER = {
    "digits": replace(WORKLOADS["digits"], epochs=22.5, evaluate_every=2.5),
    "text": replace(WORKLOADS["text"], epochs=4 / 3, evaluate_every=1 / 6),
}


@dataclass(frozen=True)
class Setting:
    """In what methods are compared: a data set, the label of the link, and how many ranks are slow."""

    data: str
    link: str
    slow: int

    def __str__(self) -> str:
        return f"{self.data}, {self.where}"

    @property
    def where(self) -> str:
        """All but the data set, in words."""
        slow = {0: "equal ranks", 1: "one slow rank"}.get(self.slow, f"{self.slow} slow ranks")
        return f"{self.link}, {slow}"

    @property
    def column(self) -> tuple[bool, str, int]:
        """Its place in a row of panels; sorts."""
        return self.link != FAST, self.link, self.slow


def planned(workload: Workload, setting: Setting, seed: int, method: str) -> tuple[str, Settings]:
    """The name and the settings of a run."""
    delays = f"seconds={workload.base_ms / 1000:g}"
    settings = Settings(
        **{k: v for k, v in asdict(workload).items() if k in FIELDS and k != "learning_rate"},
        strategy=method,
        learning_rate=workload.learning_rate / _steps_an_iteration(method),
        delays=f"{_slowness(setting.slow)}{delays}",
        seed=seed,
        schedule="constant",
        checkpoint_every=0.0,
        threads=1,
    )
    speeds = "slow" if setting.slow else "equal"
    return f"{setting.data}-{setting.link}-{speeds}-{seed}-{method}", validate(settings)


def _steps_an_iteration(method: str) -> int:
    """How many steps an optimizer takes while each group computes one gradient."""
    name, options = registry.parse(method)
    return int(options.get("groups", 1)) if name == "ps" and options.get("mode") == "async" else 1


def _slowness(ranks: int) -> str:
    if not ranks:
        return "constant:"
    count = f"count={ranks}," if ranks > 1 else ""
    return f"slow:factor={_FACTOR},{count}"
