"""The records of a run are correct, and its config.toml is enough to repeat it."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from hpcsgd.commands.cli import cli
from hpcsgd.commands.report import run_reader
from hpcsgd.commands.train.metrics import TIME_FIELDS
from hpcsgd.commands.train.settings import FIELDS
from hpcsgd.training import data, models
from tests.support.train_jobs import newest_state, records, trained, without_times

DATA, RANKS, PERIOD = "synthetic:samples=404", 2, 4  # 101 test samples: one more on a rank
COMMON = f"--data {DATA} --epochs 3 --log-every 1 --evaluate-every 0.5 --optimizer sgd --clip 5 --warmup 0.5"
TRAIN = {"event", "step", "epoch", "loss", "accuracy", "learning_rate", "compression_ratio", "gradients"}
TRAIN |= {"bytes_sent", "bytes_shared", "bytes_saved"} | TIME_FIELDS - {"hidden", "queue", "load"}
TEST = TRAIN - {"samples_per_second", "learning_rate"} | {"consensus_distance"}


def model_of(states: list[dict[str, Tensor]]) -> nn.Module:
    """The 2NN whose parameters are the mean of these."""
    model = models.build("2nn", data.load(DATA))
    mean = {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}
    model.load_state_dict(mean)
    return model.eval()


def states_of(run: Path, ranks: int) -> list[dict[str, Tensor]]:
    return [newest_state(run, rank)["run"]["model"] for rank in range(ranks)]


def assert_last_test_is_exact(run: Path, ranks: int) -> None:
    """Against one process that evaluates the final checkpoint on the whole test set."""
    source = data.load(DATA).test
    x, y = source.batch(torch.arange(len(source)))
    with torch.no_grad():
        logits = model_of(states_of(run, ranks))(x)
    last = records(run, "test")[-1]
    assert last["accuracy"] == int((logits.argmax(1) == y).sum()) / len(y)
    assert last["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)


def distance_from_mean(states: list[dict[str, Tensor]]) -> float:
    vectors = torch.stack([nn.utils.parameters_to_vector(s.values()) for s in states]).double()
    return math.sqrt(float((vectors - vectors.mean(0)).square().sum(1).mean()))


def assert_bytes(run: Path, reductions: dict[int, int]) -> None:
    """An all-reduce of B bytes in a node of p ranks moves 2(p-1)B through shared memory."""
    whole = sum(-(-value.nbytes // 64) * 64 for value in states_of(run, 1)[0].values())
    for record in records(run):
        assert record["bytes_sent"] == [0] * RANKS
        assert sum(record["bytes_shared"]) == reductions[record["step"]] * 2 * (RANKS - 1) * whole


def assert_schema(run: Path) -> None:
    for record in records(run):
        assert record.keys() == (TRAIN if record["event"] == "train" else TEST)
        assert record["epoch"] == record["step"] / 2
        for waited, computed in zip(record["wait_seconds"], record["compute_seconds"], strict=True):
            assert (
                waited >= 0 and computed >= 0 and waited + computed == pytest.approx(record["time"], abs=0.5)
            )
    counted: list[Any] = [[r[k] for r in records(run)] for k in ("step", "time", "bytes_shared")]
    assert all(column == sorted(column) for column in counted)
    assert [r["step"] for r in records(run, "test")] == [r["step"] for r in records(run, "train")]
    assert [r["samples_per_second"] > 0 for r in records(run, "train")]


@pytest.mark.long
@pytest.mark.timeout(170)
def test_the_records_of_runs(tmp_path: Path) -> None:
    first, again, local, alone = (tmp_path / name for name in ("first", "again", "local", "alone"))
    trained(
        tmp_path,
        RANKS,
        f"--name first --batch 101 {COMMON}",
        f"--name again --config {first / 'config.toml'}",
        f"--name local --batch 101 --strategy local:period={PERIOD} {COMMON}",
    )
    trained(tmp_path, 1, f"--name alone --batch 202 {COMMON}")

    config = tomllib.loads((first / "config.toml").read_text())
    assert config.keys() == FIELDS.keys() | {"world"} and config["world"].pop("run")
    assert config["world"] == {"ranks": RANKS, "nodes": 1}
    assert without_times(first) == without_times(again)

    for run in (first, local, alone):
        assert_schema(run)
        assert_last_test_is_exact(run, 1 if run == alone else RANKS)
    assert_bytes(first, {step: step for step in range(1, 7)})
    assert_bytes(local, {step: step // PERIOD for step in range(1, 7)})

    assert [r["consensus_distance"] for r in records(first, "test")] == [0.0] * 6
    distances = [r["consensus_distance"] for r in records(local, "test")]
    assert [distance > 1e-4 for distance in distances] == [step != PERIOD for step in range(1, 7)]
    assert distances[-1] == pytest.approx(distance_from_mean(states_of(local, RANKS)), rel=1e-5)

    # Two ranks with half the batch are one process with the whole.
    for one, two in zip(records(alone), records(first), strict=True):
        assert two["accuracy"] == one["accuracy"] and two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for name, value in states_of(alone, 1)[0].items():
        torch.testing.assert_close(states_of(first, 1)[0][name], value, rtol=1e-5, atol=1e-6)

    assert_reported([first, local], tmp_path / "report")


def assert_reported(runs: list[Path], out: Path) -> None:
    result = CliRunner().invoke(cli, ["report", *map(str, runs), "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    files = sorted(out.iterdir())
    assert {"report.html", "accuracy.png", "loss.png"} <= {file.name for file in files}
    assert all(file.stat().st_size > 1000 and str(file) in result.output for file in files)
    assert "all-reduce" in result.output and "local SGD" in result.output
    best = max(run_reader.load(runs[0]).test.accuracy)
    assert f"{100 * best:.2f}" in result.output or f"{100 * best:.1f}" in result.output
