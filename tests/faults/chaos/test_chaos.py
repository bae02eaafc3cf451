"""Jobs of every method, and a hand that hurts them at random: nothing hangs, nothing acknowledged is lost."""

from __future__ import annotations

import random
import shutil
from itertools import islice, pairwise
from pathlib import Path

import pytest

from tests.faults.chaos.hand import KINDS, Hand
from tests.faults.chaos.journal import Journal
from tests.faults.chaos.table import Case, Result
from tests.faults.chaos.training import METHODS
from tests.faults.chaos.trial import Options, Trial


@pytest.mark.long
def test_jobs_survive_the_hand(chaos: Options) -> None:
    """For `--chaos-seconds`; a failure prints the command that repeats it."""
    result = Trial(chaos, lambda line: print(line, flush=True)).run()
    print(result, result.json(), sep="\n")
    assert not result.failures, "\n\n".join(result.failures)


def test_the_hand_is_its_seed() -> None:
    jobs = [["kill", "stop"], list(KINDS)]
    one, other, third = (list(islice(Hand(seed, jobs, 2.5).faults(), 2000)) for seed in (1, 1, 2))
    assert one == other != third
    assert {fault.kind for fault in one} == set(KINDS)
    assert all(fault.kind in jobs[fault.job] for fault in one)
    times = [fault.at for fault in one]
    assert times == sorted(times) and 2.2 < times[-1] / len(times) < 2.8
    assert sum(a == b for a, b in pairwise(times)) > 100


def test_every_method_has_a_job() -> None:
    from hpcsgd.strategies import STRATEGIES

    assert {method.partition(":")[0].partition(" ")[0] for method in METHODS} == set(STRATEGIES)


def test_the_table_has_sums() -> None:
    result = Result(1, 60.0, [Case("kill", "lasgd", 2.0), Case("kill", "dsgd", 4.0), Case("stop", "dsgd")])
    rows = {row[:2]: row[2:] for row in result.rows()}
    assert rows["all", "all"] == (3, 2, 3.0, 4.0)
    assert rows["kill", "all"] == (2, 2, 3.0, 4.0) and rows["all", "dsgd"] == (2, 1, 4.0, 4.0)
    assert "3 faults in 60 s, 0 failures" in str(result) and '"recovered": 2' in result.json()


def test_a_damaged_checkpoint_is_no_new_one_where_it_comes_home_from_the_spare_folder(tmp_path: Path) -> None:
    """The run goes on from the checkpoint before it, in which nothing is lost."""
    run, spare = tmp_path / "run", tmp_path / "spare"
    for folder in (run / "checkpoints/step-00000010", spare / "hpcsgd-run/checkpoints/step-00000020"):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "rank-0000.pt").write_bytes(b"state")
    text = "sgp over 1 ranks on 1 node; 90 steps; run\n"
    journal = Journal(run, spare, lambda: text)
    journal.read()
    journal.damage_newest()
    shutil.copytree(spare / "hpcsgd-run/checkpoints/step-00000020", run / "checkpoints/step-00000020")
    shutil.rmtree(spare / "hpcsgd-run")
    journal.read()
    text += "sgp over 1 ranks on 1 node; 90 steps, from step 10; run\n"
    journal.read()
    text += "sgp over 1 ranks on 1 node; 90 steps; run\n"
    with pytest.raises(AssertionError, match="had one of step 10"):
        journal.read()


def test_a_trial_can_be_repeated_by_its_command() -> None:
    options = Options(seed=random.randrange(2**32), seconds=30.0, faults=7, every=1.5, jobs=2)
    words = options.command().split()
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert given.keys() == {f"--{name}" for name in Options.__annotations__}
    assert (
        Options(**{name[2:]: type(getattr(options, name[2:]))(text) for name, text in given.items()})
        == options
    )
