"""The table of training loops: a script a row, and what becomes of it under three strategies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hpcsgd import LASGD, AllReduce, LocalSGD, Strategy

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "AllReduce": AllReduce,
    "LocalSGD": lambda: LocalSGD(period=2),
    "LASGD": lambda: LASGD(period=2),
}

#: The parameters are those of one process on all data, but for rounding.
EQUAL = "equal"
#: They are within 3 bits of bfloat16 of these.
ROUNDED = "rounded"
#: Training goes the way of one process on all data: the angle between the changes of the model is small, and
#: no parameter has changed that does not change there.
SIMILAR = "similar"
#: The script's own assertions hold, and all ranks have the same model.
RUNS = "runs"
#: Ranks have parameters of their own.
OWN = "own"


@dataclass(frozen=True)
class Refused:
    """The error of all ranks, where there are several.

    Attributes
    ----------
    kind
        Name of the exception.
    text
        A part of its message.
    """

    kind: str
    text: str


Outcome = str | Refused


@dataclass(frozen=True)
class Row:
    """A script in `scripts/`, and its outcome under each strategy."""

    script: str
    allreduce: Outcome = EQUAL
    local: Outcome = SIMILAR
    lasgd: Outcome = SIMILAR

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """The outcomes by name of the strategy."""
        return dict(zip(STRATEGIES, (self.allreduce, self.local, self.lasgd), strict=True))


def everywhere(script: str, outcome: Outcome) -> Row:
    """Return a row with the same outcome under all strategies."""
    return Row(script, outcome, outcome, outcome)


_WEIGHTS = Refused("BadOption", "LASGD gives all ranks the same weight")
_UNFROZEN = Refused("HpcsgdError", "is trained now, and was not when the run started")
_DTYPE = Refused("HpcsgdError", "expected: float32 of shape")
_REPLACED = Refused("HpcsgdError", "is another parameter than the one that is trained")

ROWS = [
    # Gradients
    Row("clipping"),
    Row("norms", local=OWN, lasgd=OWN),
    Row("no_gradient"),
    Row("new_gradients"),
    Row("noise"),
    Row("hooks"),
    Row("accumulation", lasgd=RUNS),
    Row("uneven_accumulation", lasgd=RUNS),
    Row("two_passes"),
    Row("gradient_penalty"),
    Row("gradients_without_backward"),
    Row("scaler"),
    Row("scaler_of_optimizer"),
    Row("scheduler"),
    everywhere("optimizer_in_backward", Refused("HpcsgdError", "not within a hook of backward")),
    # Layers that are shared, frozen or unused
    Row("tied_by_storage"),
    Row("tied_embedding"),
    Row("reused_layer"),
    Row("checkpointing_plain"),
    Row("checkpointing_reentrant"),
    Row("unused_head"),
    Row("frozen_later"),
    Row("unfrozen_later", local=_UNFROZEN, lasgd=_UNFROZEN),
    Row("alternating_layers", local=_UNFROZEN, lasgd=_UNFROZEN),
    Row("momentum_encoder"),
    # Parameters
    Row("new_memory"),
    Row("swapped_averages"),
    Row("new_parameters", EQUAL, _REPLACED, _REPLACED),
    Row("new_dtype", Refused("HpcsgdError", "has another dtype than at the start"), _DTYPE, _DTYPE),
    Row("loss_parameters"),
    Row("second_module"),
    everywhere("second_run", Refused("BadOption", "another Run trains the parameter")),
    Row("mixed_dtypes", ROUNDED),
    Row("complex_parameters"),
    Row("sparse_gradients"),
    Row("sparse_adam"),
    Row("gradient_dtype", ROUNDED),
    Row("lazy_module"),
    everywhere("lazy_too_early", Refused("BadOption", "run one batch through the model before Run")),
    Row("quantized_frozen"),
    Row("no_elements"),
    Row("default_device"),
    Row("compiled"),
    Row("scripted"),
    Row("local_head", OWN, OWN, OWN),
    # Buffers
    Row("batchnorm", lasgd=Refused("BadOption", "SyncBatchNorm needs ranks that compute each step together")),
    everywhere("own_statistics", RUNS),
    everywhere("buffer_of_any_length", Refused("HpcsgdError", "Run(..., local=['history'])")),
    # Batches
    Row("shuffled"),
    Row("kept_batches"),
    Row("distributed_sampler"),
    Row("ragged", lasgd=_WEIGHTS),
    Row("stream"),
    Row("stream_of_wrong_length"),
    Row("hub_stream"),
    Row("generator"),
    Row("pipeline"),
    everywhere("empty_shard", Refused("HpcsgdError", "the loader has no batch at all")),
    everywhere("same_data", RUNS),
    Row("evaluation"),
    Row("look_ahead"),
    Row("loop_inside", lasgd=Refused("HpcsgdError", "call it between two loops")),
    # Steps
    Row("lbfgs"),
    Row("sam"),
    Row("gan", lasgd=RUNS),
    Row("several_steps"),
    Row("two_optimizers"),
    Row("estimates"),
    Row("own_optimizer"),
    everywhere("optimizer_step", Refused("HpcsgdError", "was called instead of run.step()")),
    Row("skipped_nan"),
    Row("skipped_out_of_memory"),
    Row("weights_by_tokens", lasgd=_WEIGHTS),
    Row("early_stopping", lasgd=Refused("HpcsgdError", "call it between two loops")),
    # The process
    Row("busy"),
    Row("saving"),
    Row("pruned_trials"),
    Row("settings_of_the_process"),
    everywhere("sub_communicator", OWN),
    # Drift
    Row("drift_of_a_weight", Refused("Disagreement", "rank 1: 0.bias differs"), RUNS, RUNS),
    Row("drift_of_a_frozen_weight", Refused("Disagreement", "0.weight differs"), RUNS, RUNS),
    Row(
        "drift_of_a_plateau",
        Refused("Disagreement", "lr of parameter group 0 differs"),
        Refused("Disagreement", "lr of parameter group 0 differs"),
        RUNS,
    ),
    Row(
        "drift_of_a_schedule",
        Refused("Disagreement", "lr of parameter group 0 differs"),
        Refused("Disagreement", "lr of parameter group 0 differs"),
        RUNS,
    ),
    Row("drift_of_an_embedding", Refused("Disagreement", "0.weight differs"), RUNS, RUNS),
]
