"""The study of parameter servers: one real launch, and its results."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcsgd.commands.bench.options import ServerOptions
from hpcsgd.commands.bench.studies import launches
from hpcsgd.commands.bench.studies.launches import ServerStudy
from hpcsgd.commands.bench.studies.runner import FinishedRun, ranks_per_method
from hpcsgd.commands.bench.studies.time_to_loss import TimeToLossTrial
from hpcsgd.commands.bench.studies.workloads import WORKLOADS, StudyCondition, plan_run
from hpcsgd.commands.cli import cli
from tests.support.launch import CLI, launch

AR, SYNC, GROUPS = "allreduce", "ps:mode=sync", "ps:mode=elastic,groups=4"
PURE = ServerStudy.baseline
BASE = 0.005  # seconds
FAST, FAST_SLOW = StudyCondition("digits", "fast", 0), StudyCondition("digits", "fast", 2)
LINK, LINK_SLOW = StudyCondition("digits", "100mbit", 0), StudyCondition("digits", "100mbit", 2)


@pytest.mark.long
@pytest.mark.timeout(120)
def test_methods_with_and_without_a_server_in_one_launch(tmp_path: Path) -> None:
    """Two of the three ranks are workers, and both are slow."""
    words = f"--methods {AR};{SYNC} --seeds 1 --base-ms {1e3 * BASE} --model logistic --epochs 0.4"
    words += f" --evaluate-every 0.2 --target 2.5 --out {tmp_path}"
    job = launch(CLI + "run()", 3, "bench", "ps", *words.split(), timeout=100)
    assert job.returncode == 0 and not job.left and not job.files, job
    listed = re.findall(r"^\d/4 (\S+): \d+ iterations", job.stdout, re.MULTILINE)
    assert listed == [
        f"digits-fast-{speeds}-0-{method}" for speeds in ("equal", "slow") for method in (AR, SYNC)
    ]
    with (tmp_path / "ps.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = 64 * 10 + 10
    for row, same in zip(rows, [rows[0]] * 4, strict=True):
        with_server = row["method"] == SYNC
        assert row["ranks"] == ("3" if with_server else "2")
        # Two workers push and get a reply in every iteration; parameters are padded to aligned addresses.
        moved = with_server * int(row["iterations"]) * 2 * 2 * 4 * values
        assert int(row["server_bytes"]) == pytest.approx(moved, rel=0.02)
        assert float(row["loss"]) == pytest.approx(float(same["loss"]), rel=1e-4)
        assert row["fewest_gradients"] == row["most_gradients"] == row["iterations"]
        slow = "count=2" in row["simulated_delays"]
        assert float(row["ms_per_iteration"]) > (4e3 if slow else 1e3) * BASE
    table = (tmp_path / "ps.md").read_text().splitlines()
    assert table[0].startswith("| digits | fast, equal ranks | fast, 2 slow ranks | final accuracy (%) |")
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {AR}", f"| {SYNC}"]
    assert (tmp_path / "ps.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("methods", "ranks", "expected"),
    [
        ([AR, SYNC, "ps:servers=0"], 5, [4, 5, 4]),
        ([AR, SYNC, "ps:servers=2"], 6, [4, 5, 6]),
        ([AR, "sgp"], 5, [5, 5]),
        ([AR, SYNC], 1, [1, 1]),
    ],
)
def test_all_methods_have_equally_many_workers(methods: list[str], ranks: int, expected: list[int]) -> None:
    assert ranks_per_method(methods, ranks) == dict(zip(methods, expected, strict=True))


def test_the_slow_ranks_are_those_of_the_first_group() -> None:
    plans = [plan_run(WORKLOADS["digits"], condition, 0, GROUPS) for condition in (LINK, LINK_SLOW)]
    assert [name for name, _ in plans] == [
        f"digits-100mbit-{speeds}-0-{GROUPS}" for speeds in ("equal", "slow")
    ]
    assert [settings.delays for _, settings in plans] == [
        "constant:seconds=0.02",
        "slow:factor=4,count=2,seconds=0.02",
    ]


@pytest.mark.parametrize("groups", [4, 8])
def test_learning_rate_is_divided_by_steps_per_iteration(groups: int) -> None:
    """Eight asynchronous steps at a rate equal one step at eight times the rate."""
    rates = [
        plan_run(ServerStudy.workloads["digits"], LINK, 0, f"ps:mode={mode},groups={groups}")[1].learning_rate
        for mode in ("async", "sync", "elastic")
    ]
    assert rates[0] * groups == rates[1] == rates[2]


def trial(
    condition: StudyCondition, method: str, seconds: float = 1.0, target: float = 3.0
) -> TimeToLossTrial:
    """A run with two workers, of which the second waits three quarters of its time, and an idle server."""
    test = SimpleNamespace(
        step=np.array([10, 20]),
        time=seconds * np.array([1, 2]),
        loss=np.array([4.0, 2.0]),
        accuracy=np.array([0.1, 0.9]),
        bytes_sent=np.array([[0, 0, 0], [7, 7, 5_000_000]]),
    )
    train = SimpleNamespace(
        wait_seconds=np.array([[0.0, 3.0, 9.0]]), compute_seconds=np.array([[1.0, 1.0, 0.0]])
    )
    config = {"delays": "none", "world": {"ranks": 3, "nodes": 4}}
    record: Any = SimpleNamespace(test=test, train=train, config=config)
    return TimeToLossTrial(condition, 0, method, FinishedRun(record, [10, 20, 0]), target)


def test_a_server_is_no_worker() -> None:
    found = trial(FAST, SYNC)
    assert (found.workers, found.gradients) == (2, [10, 20])
    assert found.waiting == (0 + 3 / 4) / 2
    assert found.server_bytes == 10_000_000
    assert trial(FAST, AR).workers == 3 and trial(FAST, AR).server_bytes == 0


def study(
    settings: list[StudyCondition], share: float, methods: tuple[str, ...] = (AR, PURE, GROUPS)
) -> ServerStudy:
    """Elastic groups take `share` of the time of all other methods."""
    trials = [trial(s, m, share if m == GROUPS else 1.0) for s in settings for m in methods]
    return ServerStudy(trials)


def test_tables_show_bytes_through_the_servers(capsys: pytest.CaptureFixture[str]) -> None:
    found = study([LINK], 0.5)
    (table,) = found.tables()
    table.show()
    printed = capsys.readouterr().out
    assert "MB through" in printed and "4 nodes" in printed and "1 seed" in printed
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in found.markdown("digits").splitlines()
    ]
    header = ["digits", "100mbit, equal ranks", "final accuracy (%)", "waiting (%)", "MB through the servers"]
    assert rows[0] == header
    assert rows[2:] == [
        [AR, "1.5 s (1.00)", "90.0", "58", "0"],
        [PURE, "1.5 s", "90.0", "38", "10"],
        [GROUPS, "0.75 s (0.50)", "90.0", "38", "10"],
    ]


def test_condition_without_runs_of_a_method_stays_empty() -> None:
    ran = [(LINK, PURE), (LINK_SLOW, PURE), (LINK_SLOW, AR)]
    lines = (
        ServerStudy([trial(condition, method, target=1.0) for condition, method in ran])
        .markdown("digits")
        .splitlines()
    )
    assert lines[2] == f"| {PURE} | never | never | 90.0, 90.0 | 38, 38 | 10, 10 |"
    assert lines[3] == f"| {AR} |  | never | 90.0 | 58 | 0 |"


def test_command_defaults_to_all_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[ServerOptions] = []
    monkeypatch.setattr(launches, "main", called.append)
    cli(["bench", "ps"], standalone_mode=False)
    cli(["bench", "ps", "--methods", f"{SYNC}; {GROUPS}", "--seeds", "1"], standalone_mode=False)
    assert called == [ServerOptions(), ServerOptions(methods=[SYNC, GROUPS], seeds=1)]
    assert called[0].out == Path("ps") and set(ranks_per_method(called[0].methods, 9).values()) == {8, 9}
