"""Each row of the table holds: against one process on all data, which knows nothing of hpcsgd."""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import hpcsgd
from tests.loops.runner import SCRIPTS, at_the_start, with_hpcsgd, without_hpcsgd
from tests.loops.table import EQUAL, OWN, ROUNDED, ROWS, RUNS, SIMILAR, STRATEGIES, Outcome, Refused, Row

#: Cosine of the angle between the change of the model and that in one process, at least.
_SIMILAR = 0.6
_TOLERANCES = {EQUAL: {"rtol": 1e-4, "atol": 5e-6}, ROUNDED: {"rtol": 0.03, "atol": 0.01}}


@pytest.mark.mpi
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.script)
@pytest.mark.filterwarnings("ignore")
def test_loop(world: Any, row: Row, name: str) -> None:
    if 24 % world.size or world.size > 12:
        pytest.skip("the batches of all data do not divide by the ranks")
    if world.size > 3 and name != "AllReduce":
        pytest.skip("the table is that of 1, 2 and 3 ranks; with more only AllReduce has other code")
    strategy, outcome = STRATEGIES[name], row.outcomes[name]
    if isinstance(outcome, Refused) and (world.size > 1 or row.script == "lazy_too_early"):
        if name == "LASGD":  # a rank that the others leave no step would not get to the error
            strategy = functools.partial(hpcsgd.LASGD, period=2, max_lag=2, trigger="all")
        with pytest.raises(hpcsgd.HpcsgdError, match=re.escape(outcome.text)) as caught:
            with_hpcsgd(row.script, strategy, world)
        assert type(caught.value).__name__ == outcome.kind
        world.progress.drain()
        return
    found = with_hpcsgd(row.script, strategy, world)
    if outcome not in (OWN, *([RUNS] if world.size == 1 else [])):
        check_same_everywhere(world, found)
        if world.rank:
            return  # The others leave the cores to rank 0, whose model is theirs too.
    if world.size == 1:
        check_equal(found, without_hpcsgd(row.script, 1), rtol=0, atol=0)
    elif outcome in _TOLERANCES:
        check_equal(found, without_hpcsgd(row.script, world.size), **_TOLERANCES[str(outcome)])
    elif outcome == SIMILAR:
        check_similar(found, without_hpcsgd(row.script, world.size), at_the_start(row.script))


def check_same_everywhere(world: Any, found: dict[str, torch.Tensor]) -> None:
    for others in world.gather(found):
        assert all(torch.equal(others[name], value) for name, value in found.items())


def check_equal(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerances: float
) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, n=name: f"{n}: {text}", **tolerances)


def check_similar(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> None:
    changes = []
    for name, before in start.items():
        if before.is_quantized or not before.numel():
            continue
        moved, other = found[name] - before, expected[name] - before
        # The mean of three equal models differs from each by rounding.
        assert (moved.abs().max() > 1e-5) == (other.abs().max() > 1e-5), name
        changes.append((as_real(moved), as_real(other)))
    mine, theirs = (torch.cat(each) for each in zip(*changes, strict=True))
    assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > _SIMILAR


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten().double()


@pytest.mark.mpi(min_size=2)
def test_the_same_data_on_all_ranks_are_a_warning(world: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with_hpcsgd("same_data", STRATEGIES["AllReduce"], world)
    assert any("they train on the same data" in str(each.message) for each in caught) == (world.rank == 0)


def test_scripts_are_short_and_use_public_names() -> None:
    scripts = {path.stem: path.read_text() for path in SCRIPTS.glob("*.py")}
    assert scripts.keys() - {"task"} == {row.script for row in ROWS}
    for name, text in scripts.items():
        assert text.count("\n") <= 30 and not re.search(r"(run|hpcsgd)\w*\._", text), name


def test_the_page_shows_the_table() -> None:
    text = (Path(__file__).parent / "README.md").read_text()
    shown = dict(re.findall(r"^\| \[`(\w+)`\]\(scripts/\1\.py\) (\|.*)\|$", text, re.MULTILINE))
    assert shown.keys() == {row.script for row in ROWS}
    for row in ROWS:
        assert shown[row.script].rstrip(" ").endswith(" | ".join(map(_word, row.outcomes.values()))), (
            row.script
        )


def test_the_page_names_tests_that_exist() -> None:
    text = (Path(__file__).parent / "README.md").read_text()
    sources = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", text)
    assert names and all(f"def {name}(" in sources for name in names)


def _word(outcome: Outcome) -> str:
    return "error" if isinstance(outcome, Refused) else outcome
