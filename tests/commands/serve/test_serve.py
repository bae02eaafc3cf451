"""`hpcsgd serve` and `hpcsgd train --connect`: stop, resume, and invalid options."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.background import Job
from tests.support.train_jobs import records, run_commands

TRAIN = ("train", "--data", "synthetic:samples=404", "--threads", 1, "--progress", "plain")
SERVE = ("serve", "--listen", "servers", "--progress", "plain")


@pytest.mark.timeout(240)
def test_stopped_group_and_server_resume(tmp_path: Path) -> None:
    strategy = ("--strategy", "ps:mode=elastic,interval=4", "--connect", "servers", "--epochs", 8)
    pause = ("--delays", "constant:seconds=0.02")
    serve = (*SERVE, "--mode", "elastic", "--alpha", 0.5)
    with (
        Job(tmp_path, "server", *serve) as server,
        Job(tmp_path, "group", *TRAIN, *strategy, *pause, "--out", tmp_path, "--name", "run") as group,
    ):
        group.wait_for("epoch 2.00/")
        server.send(signal.SIGTERM)
        assert server.end() == 0 and not (tmp_path / "servers").exists()
        assert "SIGTERM: state after" in server.text
        # The resumed run is another group.
        with Job(tmp_path, "second", *serve, "--groups", 2) as second:
            group.wait_for("epoch 4.00/")
            group.send(signal.SIGUSR1)
            assert group.end() == 0 and "SIGUSR1: checkpoint" in group.text
            resume = ("train", "--resume", tmp_path / "run", "--delays", "none")
            with Job(tmp_path, "resumed", *resume) as resumed:
                assert (resumed.end(), second.end()) == (0, 0), (resumed.text, second.text)
    steps = [record["step"] for record in records(tmp_path / "run", "test")]
    assert steps == sorted(set(steps)) and steps[-1] == 8 * 13
    path = tmp_path / "servers.checkpoint" / "server-0" / "metrics.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    assert [client["state"] for client in last["clients"]] == ["done", "done"]
    assert set(last["versions"].values()) == {8 * 13 // 4}


@pytest.mark.timeout(240)
def test_compressed_groups_have_the_same_bits_though_the_server_is_killed(tmp_path: Path) -> None:
    """Rounding is drawn anew in each run, from the seed and the number of the push alone.

    The group stops for exchanges of signals at other steps, as it does when it is slowed down.
    """
    group = (*TRAIN, "--strategy", "ps", "--connect", "servers", "--epochs", 3, "--seed", 5, "--name", "run")
    group += ("--compress", "fp16", "--out", ".")
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        pause = ("--delays", "constant:seconds=0.03", "--log-every", 4) if name == "killed" else ()
        with Job(folder, "server", *SERVE) as server, Job(folder, "group", *group, *pause) as job:
            if name == "killed":
                job.wait_for("epoch 1.00/")
                server.send(signal.SIGKILL)
                assert server.end() == -signal.SIGKILL
                with Job(folder, "again", *SERVE) as again:
                    assert (job.end(), again.end()) == (0, 0), (job.text, again.text)
                    assert "resumed after" in again.text
            else:
                assert (job.end(), server.end()) == (0, 0), (job.text, server.text)
    centres = [_shards(tmp_path / name / "servers.checkpoint") for name in ("undisturbed", "killed")]
    assert centres[0].keys() == centres[1].keys()
    for index, shard in centres[0].items():
        assert torch.equal(shard["centre"], centres[1][index]["centre"])
    assert sum(shard["version"] for shard in centres[0].values()) == 39 * len(centres[0])


@pytest.mark.timeout(120)
def test_a_folder_is_for_the_servers_of_one_job_and_a_file_of_the_last_ones_alone(tmp_path: Path) -> None:
    file = tmp_path / "servers"
    with Job(tmp_path, "one", *SERVE) as one:
        one.wait_for("hpcsgd train --connect")
        with Job(tmp_path, "two", *SERVE) as two:
            assert two.end() == 2 and "is in use by another job" in two.text, two.text
        one.send(signal.SIGKILL)
        assert one.end() == -signal.SIGKILL
    # Servers with a folder of their own, then others that write the same file.
    with Job(tmp_path, "three", *SERVE, "--checkpoint", "three.state") as three:
        three.wait_for("hpcsgd train --connect")
        with Job(tmp_path, "four", *SERVE) as four:
            four.wait_for("hpcsgd train --connect")  # the lock of the killed one is taken over
            written = file.read_text()
            three.send(signal.SIGTERM)
            assert three.end() == 0 and file.read_text() == written, three.text
            four.send(signal.SIGTERM)
            assert four.end() == 0 and not file.exists(), four.text


def _shards(folder: Path) -> dict[int, dict[str, Any]]:
    """Shards in the last checkpoint of a server."""
    state = torch.load(max((folder / "server-0").glob("step-*")) / "rank-0000.pt", weights_only=True)
    shards: dict[int, dict[str, Any]] = state["shards"]
    return shards


def test_invalid_options_are_errors(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    about = {"mode": "async", "alpha": None, "servers": 1, "secret": "?"}
    (tmp_path / "job" / "job.json").write_text(json.dumps(about))
    (tmp_path / "junk").write_text("{}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "job.json").write_text("[]")
    (tmp_path / "in-the-way" / "server-0" / "metrics.jsonl").mkdir(parents=True)
    stale = {"secret": "x", "servers": [[["127.0.0.1"], 9, ""]]}
    (tmp_path / "stale").write_text(json.dumps(stale))
    cases = [
        ((*TRAIN, "--connect", "x"), "--connect needs a strategy with parameter servers"),
        (
            (*TRAIN, "--strategy", "ps", "--connect", tmp_path / "x", "--timeout", 0.3),
            "no server has written",
        ),
        ((*TRAIN, "--strategy", "ps", "--connect", tmp_path / "junk"), "is not a file of `hpcsgd serve"),
        (
            (*TRAIN, "--strategy", "ps", "--connect", tmp_path / "stale", "--timeout", 0.3),
            "cannot be reached for 0.3 s",
        ),
        ((*SERVE, "--checkpoint", tmp_path / "job"), "belongs to servers with another mode"),
        ((*SERVE, "--mode", "none"), "expected one of sync, async, elastic"),
        ((*SERVE, "--lease", 0), "expected a number from 0.001 to 1e9, got '0'"),
        (
            (*SERVE, "--checkpoint", tmp_path / "new", "--bind", "198.51.100.0/24"),
            "is no address, network or interface of",
        ),
        ((*SERVE, "--checkpoint", tmp_path / "damaged"), "job.json is damaged"),
        ((*SERVE, "--checkpoint", tmp_path / "junk"), "choose another --checkpoint folder"),
        ((*SERVE, "--checkpoint", tmp_path / "in-the-way"), "server 0 cannot start"),
        (("serve", "--listen", tmp_path / "job", "--checkpoint", tmp_path / "new"), "give --listen a file"),
    ]
    commands = [(*command, *(["--out", tmp_path] if command[0] == "train" else [])) for command, _ in cases]
    for outcome, (command, text) in zip(run_commands(tmp_path, 1, *commands), cases, strict=True):
        assert outcome.codes == [2] and text in outcome.errs[0], (command, outcome)
        assert "Traceback" not in outcome.errs[0], (command, outcome)
