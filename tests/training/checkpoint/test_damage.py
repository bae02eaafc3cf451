"""Damaged checkpoints: all ranks continue from the newest that is whole, or none does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoint_ranks import DAMAGES, RANKS, damage, names, on_ranks, save, the_error

FILES = ("rank-0000.pt", "rank-0002.pt", "manifest.json", "")  # "": the folder itself


def newest_whole(folder: Path) -> tuple[int, list[str]]:
    """The step that all ranks load, and the lines on those that they do not."""
    results = on_ranks(folder, lambda c, r: c.load_newest_whole())
    found = {(states[0]["step"], tuple(damaged)) for (states, _), damaged in results}
    assert [states[0]["rank"] for (states, _), _ in results] == list(range(RANKS))
    ((step, lines),) = found
    return step, list(lines)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_all_ranks_continue_from_the_newest_that_is_whole(tmp_path: Path, name: str, how: str) -> None:
    save(tmp_path, 10, 20, 30, 40, keep=4)
    damage(tmp_path / "step-00000040" / name, how)
    damage(tmp_path / "step-00000030" / "rank-0001.pt", "flipped")
    step, lines = newest_whole(tmp_path)
    assert step == 20
    if (name, how) == ("", "missing"):
        assert len(lines) == 1
    else:
        place = (
            "rank 0: "
            if name == "rank-0000.pt"
            else "rank 2: "
            if name == "rank-0002.pt"
            else "ranks 0, 1, 2: "
        )
        assert lines[0].startswith(f"step 40: {place}") and "step-00000040" in lines[0]
    assert lines[-1].startswith("step 30: rank 1: ") and "rank-0001.pt is damaged" in lines[-1]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_does_not_stand_in_the_way_of_further_checkpoints(tmp_path: Path, name: str, how: str) -> None:
    """Neither of the same step nor of a later one; and it does not count as one of those that are kept."""
    for later in (40, 50):
        folder = tmp_path / str(later)
        save(folder, 20, 30, 40, keep=3)
        damage(folder / "step-00000040" / name, how)

        def continue_(points: object, rank: int, step: int = later) -> None:
            points.load_newest_whole()  # type: ignore[attr-defined]
            points.save(step, {"step": step, "rank": rank}, {})  # type: ignore[attr-defined]

        assert on_ranks(folder, continue_) == [None] * RANKS
        assert names(folder) == ["step-00000030", f"step-000000{later}"]
        assert newest_whole(folder) == (later, [])


def test_if_none_is_whole_the_error_names_each(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, keep=3)
    for step, how in zip((10, 20, 30), ("missing", "empty", "flipped"), strict=True):
        damage(tmp_path / f"step-000000{step}" / "rank-0001.pt", how)
    message = the_error(on_ranks(tmp_path, lambda c, r: c.load_newest_whole()))
    assert f"no checkpoint in {tmp_path} is whole" in message
    for step, why in ((10, "is missing"), (20, "got 0 bytes"), (30, "got sha256")):
        (line,) = [line for line in message.splitlines() if f"step {step}: rank 1: " in line]
        assert why in line
    assert f"remove {tmp_path}" in message


def test_without_any_checkpoint_there_is_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert on_ranks(folder, lambda c, r: c.load_newest_whole()) == [None] * RANKS


def test_one_that_is_whole_and_does_not_fit_is_not_passed_over(tmp_path: Path) -> None:
    """An older one would fit: but the steps since would be lost."""
    save(tmp_path, 10, ranks=2, keep=3)
    on_ranks(tmp_path, lambda c, r: c.save(20, {"step": 20}, {}), keep=3)
    message = the_error(on_ranks(tmp_path, lambda c, r: c.load_newest_whole(), ranks=2))
    assert "step 20" in message and "saved by another number of ranks" in message
