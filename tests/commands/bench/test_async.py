"""The study of asynchronous methods: real runs of several launches in one folder, and its results."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest

from hpcsgd.commands.bench.options import AsyncOptions
from hpcsgd.commands.bench.studies import launches, runner
from hpcsgd.commands.bench.studies.launches import AsyncStudy, finished_trials
from hpcsgd.commands.bench.studies.runner import FinishedRun
from hpcsgd.commands.bench.studies.time_to_loss import TimeToLossTrial
from hpcsgd.commands.bench.studies.workloads import WORKLOADS, StudyCondition, plan_run
from hpcsgd.commands.cli import cli
from hpcsgd.commands.train.settings import Settings, to_toml
from hpcsgd.errors import BadOption
from tests.support.launch import CLI, launch

AR, LASGD = "allreduce", "lasgd:period=auto"
BASE = 0.005  # seconds
FAST, FAST_SLOW = StudyCondition("digits", "fast", 0), StudyCondition("digits", "fast", 1)
LINK, LINK_SLOW = StudyCondition("digits", "100mbit", 0), StudyCondition("digits", "100mbit", 1)

# Two launches with different labels in one folder.
LABELS = """
import contextlib
from hpcsgd.mpi import launcher

def run(label):
    if launcher.rank() == 0:
        print("launch", label, flush=True)
    with contextlib.suppress(SystemExit):
        main()
    sys.argv[-1] = "100mbit"

run("first")
run("second")
"""


@pytest.mark.long
@pytest.mark.timeout(170)
def test_launches_with_two_labels_go_into_one_folder(tmp_path: Path) -> None:
    words = f"--methods {AR};{LASGD} --seeds 1 --base-ms {1e3 * BASE} --model logistic --epochs 0.4"
    words += f" --evaluate-every 0.2 --target 2.5 --out {tmp_path} --link fast"
    job = launch(CLI + LABELS, 2, "bench", "async", *words.split(), timeout=120)
    assert job.returncode == 0 and not job.left and not job.files, job
    runs = {
        link: [f"digits-{link}-{speeds}-0-{method}" for speeds in ("equal", "slow") for method in (AR, LASGD)]
        for link in ("fast", "100mbit")
    }
    printed = [re.split("launch [a-z]+\n", job.stdout)[i] for i in (1, 2)]
    listed = [re.findall(r"^\d/4 (\S+): \d+ iterations", part, re.MULTILINE) for part in printed]
    assert listed == [runs["fast"], runs["100mbit"]]
    assert all("simulated delays slow:factor=4,seconds=0.005" in part for part in printed)
    with (tmp_path / "async.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [
        f"{r['data']}-{r['link']}-{r['simulated_delays'][:4]}-{r['seed']}-{r['method']}".replace(
            "cons", "equal"
        )
        for r in rows
    ]
    assert names == runs["fast"] + runs["100mbit"]
    for row in rows:
        waits = row["method"] == AR and row["simulated_delays"].startswith("slow")
        # All-reduce waits for the slow rank, which sleeps four times as long.
        assert float(row["ms_per_iteration"]) > (4e3 if waits else 0.5e3) * BASE
        assert (row["fewest_gradients"] == row["most_gradients"]) or row["method"] == LASGD
        assert 0 <= float(row["waiting"]) < 1 and (row["ranks"], row["nodes"]) == ("2", "1")
    everything = {*runs["fast"], *runs["100mbit"], "async.csv", "async.md", "async.png"}
    assert {path.name for path in tmp_path.iterdir()} == everything
    assert (tmp_path / "async.png").stat().st_size > 1000


def write_run_folder(out: Path, name: str, settings: Settings, ranks: int = 4, share: float = 1.0) -> None:
    """Write the folder of a run; an interrupted run has completed `share` of its epochs."""
    folder = out / name
    folder.mkdir(parents=True)
    stored = replace(settings, out="elsewhere", name=name, progress="off")
    (folder / "config.toml").write_text(to_toml(stored, {"ranks": ranks, "nodes": 4}))
    keys = ("bytes_sent", "bytes_shared", "bytes_saved", "gradients")
    record = {
        "event": "test",
        "step": 9,
        "epoch": share * settings.epochs,
        "time": 2.5,
        "loss": 1.0,
        "accuracy": 0.5,
        "consensus_distance": 0.0,
        **{key: [9] * ranks for key in keys},
    }
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def found_trials(out: Path, methods: list[str], **given: Any) -> list[tuple[StudyCondition, str, int]]:
    """The runs of four ranks and at most three seeds that a study of digits finds."""
    workloads = {**WORKLOADS, "digits": replace(WORKLOADS["digits"], **given)}
    trials = finished_trials(out, workloads, dict.fromkeys(methods, 4), 3, 1)
    return [(trial.condition, trial.method, trial.seed) for trial in trials]


def test_complete_runs_with_equal_options_are_found(tmp_path: Path) -> None:
    digits, text = WORKLOADS["digits"], WORKLOADS["text"]
    slow_text = StudyCondition("text", "1gbit", 1)
    for seed in (0, 1):
        write_run_folder(tmp_path, *plan_run(digits, LINK, seed, AR))
        write_run_folder(tmp_path, *plan_run(digits, FAST_SLOW, seed, AR))
        write_run_folder(tmp_path, *plan_run(text, slow_text, seed, LASGD))
        write_run_folder(tmp_path, *plan_run(digits, LINK, seed, "sgp"), ranks=2)
        write_run_folder(tmp_path, *plan_run(digits, LINK, seed, "dsgd"), share=1 - 0.5 * seed)
        write_run_folder(tmp_path, *plan_run(digits, LINK, seed, "local"))
    (tmp_path / "digits-fast-equal-0-local").mkdir()
    methods = ["sgp", AR, "dsgd", LASGD]
    in_text = [(slow_text, LASGD, 0), (slow_text, LASGD, 1)]
    here = [(condition, AR, seed) for condition in (FAST_SLOW, LINK) for seed in (0, 1)]
    assert found_trials(tmp_path, methods) == here + in_text
    assert found_trials(tmp_path, methods, learning_rate=0.5) == in_text, (
        "the other data set has its defaults"
    )
    assert found_trials(tmp_path, methods, target=9.0) == here + in_text


def trial(
    condition: StudyCondition,
    method: str,
    seed: int,
    losses: list[float],
    seconds: float = 1.0,
    target: float = 3.0,
) -> TimeToLossTrial:
    """A run on two ranks, with 10 iterations and `seconds` between evaluations; the second rank waits."""
    count = np.arange(1, len(losses) + 1)
    test = SimpleNamespace(
        step=10 * count,
        time=seconds * count,
        loss=np.array(losses),
        accuracy=np.linspace(0, 0.9 - 0.01 * seed, len(losses)),
    )
    train = SimpleNamespace(
        wait_seconds=np.array([[0.0, 0.0], [0.0, 3.0]]), compute_seconds=np.array([[1.0, 1.0], [4.0, 1.0]])
    )
    config = {"delays": "none", "world": {"ranks": 2, "nodes": 1}}
    record: Any = SimpleNamespace(test=test, train=train, config=config)
    return TimeToLossTrial(condition, seed, method, FinishedRun(record, [10, 20]), target)


@pytest.mark.parametrize(
    ("losses", "iterations"),
    [
        ([4.0, 2.0, 1.0], 15),  # half way between two evaluations
        ([4.0, 3.0, 1.0], 20),
        ([2.0, 1.0, 0.5], 10),  # no later than the first
        ([4.0, 2.5, 3.5, 2.5, 3.5], 20 - 10 / 3),  # the first time
        ([np.nan, 1.0], 20),  # nothing to interpolate with
        ([np.inf, 1.0], 20),
        ([4.0, 3.5, 3.1], np.inf),
        ([np.nan, np.nan], np.inf),
    ],
)
def test_time_to_a_loss_is_interpolated(losses: list[float], iterations: float) -> None:
    reached = trial(FAST, AR, 0, losses, seconds=5.0).reached
    assert reached == pytest.approx((iterations, iterations / 2))


def test_waiting_is_a_share_of_each_ranks_own_time() -> None:
    assert trial(FAST, AR, 0, [1.0, 1.0]).waiting == (0 + 3 / 4) / 2


def small_study(
    condition: StudyCondition, share: float, methods: tuple[str, ...] = (AR, LASGD)
) -> AsyncStudy:
    """LASGD takes `share` of all-reduce's time."""
    trials = [
        trial(condition, method, seed, losses, share if method == LASGD else 1)
        for method in methods
        for seed, losses in enumerate([[4.0, 2.0], [4.0, 3.0], [4.0, 3.5]])
    ]
    return AsyncStudy(trials)


def test_medians_over_the_seeds_and_mean_accuracy() -> None:
    small = small_study(FAST, 0.5)
    found = small.runs(FAST, LASGD)
    # Reached after 15 iterations, 20 and never.
    assert (found.seconds, found.reached) == (0.05, (20, 1.0))
    (table,) = small.tables()
    cells = {runs.method: [column.text(runs) for column in table.columns] for runs in table.results}
    assert cells[LASGD] == [LASGD, "50.0", "20", "1.00", "0.50", "89.0 ± 1.0", "38", "10..20"]
    assert "simulated" in table.title


def test_nothing_is_relative_to_a_baseline_that_has_not_run() -> None:
    study = small_study(FAST, 1.0, methods=(LASGD, "sgp"))
    assert np.isnan(study.ratio(study.runs(FAST, LASGD)))


def test_panels_share_an_axis_within_their_data_set() -> None:
    text = StudyCondition("text", "100mbit", 1)
    settings = [FAST, FAST_SLOW, LINK_SLOW, replace(text, link="fast"), text]
    scale = {"digits": 1, "text": 50}
    target = {"digits": 3.0, "text": 100.0}
    trials = [
        trial(s, m, 0, [4.0 * scale[s.data], scale[s.data]], target=target[s.data])
        for s in settings
        for m in (AR, LASGD)
    ]
    shown = AsyncStudy(trials)
    assert shown.panels_in_row == 3
    axes = shown.figure().axes
    assert [a.get_title(loc="left") for a in axes] == [str(condition) for condition in settings]
    places = [(a.get_subplotspec().rowspan.start, a.get_subplotspec().colspan.start) for a in axes]  # type: ignore[union-attr]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)], "a gap where nothing has run"
    assert {a.get_ylim() for a in axes[:3]} == {axes[0].get_ylim()} and axes[0].get_ylim()[1] < 10
    assert axes[3].get_ylim() == axes[4].get_ylim() and axes[3].get_ylim()[1] > 100
    assert [bool(a.get_ylabel()) for a in axes] == [True, False, False, True, False]


def test_command_options_are_the_attributes_of_the_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[AsyncOptions] = []
    monkeypatch.setattr(launches, "main", called.append)
    cli(["bench", "async"], standalone_mode=False)
    cli(["bench", "async", "--data", "text", "--methods", "sgp; lasgd", "--clip", "2"], standalone_mode=False)
    assert called[0] == AsyncOptions() and called[1].methods == ["sgp", "lasgd"]
    given = {name: getattr(called[1], name) for name in vars(WORKLOADS["text"])}
    assert given.pop("data") == "text" and given.pop("clip") == 2 and set(given.values()) == {None}
    for name in WORKLOADS:
        cli(["bench", "async", "--data", name], standalone_mode=False)
    with pytest.raises(click.BadParameter):
        cli(["bench", "async", "--data", "mnist"], standalone_mode=False)
    with pytest.raises(click.BadParameter, match="letters, digits"):
        cli(["bench", "async", "--link", "a-b"], standalone_mode=False)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": -1.0},
        {"clip": 0.0},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        launches.main(AsyncOptions(**options))


def test_run_with_other_settings_is_not_overwritten(tmp_path: Path) -> None:
    name, settings = plan_run(WORKLOADS["digits"], FAST, 0, AR)
    write_run_folder(tmp_path, name, replace(settings, batch=7))
    world: Any = SimpleNamespace(size=4, nodes=4)
    with pytest.raises(BadOption, match="another batch"):
        runner._is_complete(world, tmp_path / name, replace(settings, name=name, progress="off"))
