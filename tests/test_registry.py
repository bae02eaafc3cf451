"""Specs: what is written is what is built, and what cannot be built names what can."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd import registry
from hpcsgd.errors import BadOption, HpcsgdError


def everything(
    count: int = 3,
    rate: float = 0.5,
    nested: bool = False,
    label: str = "",
    folder: Path = Path("data"),
    mode: Literal["pull", "push"] = "pull",
    limit: float | None = None,
    shape: tuple[int, ...] = (3, 32, 32),
    betas: tuple[float, float] = (0.9, 0.999),
) -> dict[str, Any]:
    """Give back every option.

    More that no list shows.
    """
    return dict(locals())


@dataclass
class Local:
    """Average every few steps."""

    world: object
    period: int
    seed: int = 0


class Plain:
    pass


def picky(size: int = 4) -> int:
    if size < 0:
        raise ValueError("size must be positive")
    if size > 9:
        raise HpcsgdError("size is too large")
    return size


ROWS: dict[str, Any] = {
    "everything": everything,
    "local-sgd": Local,
    "2nn": Plain,
    "picky": picky,
    "frozen": partial(everything, count=7),
}


def test_parse_splits_at_the_first_colon_and_equals() -> None:
    assert registry.parse("fashion-mnist") == ("fashion-mnist", {})
    assert registry.parse("2nn: hidden = 64 , act=relu") == ("2nn", {"hidden": "64", "act": "relu"})
    assert registry.parse("text:folder=c:/a=b/c:d,empty=") == (
        "text",
        {"folder": "c:/a=b/c:d", "empty": ""},
    )


@pytest.mark.parametrize("spec", ["", "  ", ":a=1", "n:", "n:a", "n:=1", "n:a=1,", "n:a=1,a=1"])
def test_malformed_specs_are_refused(spec: str) -> None:
    with pytest.raises(BadOption, match=r"name|read option|twice"):
        registry.parse(spec)


NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,8}", fullmatch=True)
VALUES = st.text(st.characters(codec="ascii", exclude_characters=","), max_size=8).map(str.strip)


@settings(deadline=None)
@given(NAMES, st.dictionaries(NAMES, VALUES, max_size=4))
def test_parse_reads_what_is_written(name: str, options: dict[str, str]) -> None:
    written = ",".join(f"{key}={value}" for key, value in options.items())
    assert registry.parse(f"{name}:{written}" if options else name) == (name, options)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("count=-2", -2),
        ("rate=1e-3", 1e-3),
        ("nested=Yes", True),
        ("nested=1", True),
        ("nested=false", False),
        ("label=a:b=c/d", "a:b=c/d"),
        ("folder=a/b", Path("a/b")),
        ("mode=push", "push"),
        ("limit=none", None),
        ("limit=2", 2.0),
        ("shape=1x28x28", (1, 28, 28)),
        ("shape=7", (7,)),
        ("betas=0.8x0.9", (0.8, 0.9)),
    ],
)
def test_values_get_the_type_of_the_annotation(written: str, value: object) -> None:
    built = registry.build(ROWS, f"everything:{written}", "row")
    key = written.partition("=")[0]
    assert built == {**everything(), key: value}
    assert type(built[key]) is type(value)


@pytest.mark.parametrize(
    "written",
    [
        "count=1.5",
        "count=none",
        "rate=fast",
        "rate=nan",
        "nested=2",
        "mode=drop",
        "limit=nil",
        "shape=3x",
        "shape=3;4",
        "betas=0.9",
        "betas=0.9x0.9x0.9",
    ],
)
def test_values_of_the_wrong_type_are_refused_with_all_options(written: str) -> None:
    with pytest.raises(BadOption) as caught:
        registry.build(ROWS, f"everything:{written}", "row")
    message = str(caught.value)
    assert repr(written.partition("=")[2]) in message
    assert "count=int (default 3)" in message
    assert "nested=yes|no (default no)" in message
    assert "mode=pull|push (default pull)" in message
    assert "limit=float|none (default none)" in message
    assert "shape=intx... (default 3x32x32)" in message


def test_unknown_names_and_options_are_answered_with_the_valid_ones() -> None:
    with pytest.raises(BadOption, match="unknown strategy 'locale'") as caught:
        registry.build(ROWS, "locale:period=2", "strategy")
    assert all(name in str(caught.value) for name in ROWS)
    with pytest.raises(BadOption, match="strategy 'local-sgd' has no option 'periods'") as caught:
        registry.build(ROWS, "local-sgd:periods=2", "strategy", world=None)
    assert "period=int (required), seed=int (default 0)" in str(caught.value)
    with pytest.raises(BadOption, match="valid options: none"):
        registry.build(ROWS, "2nn:a=1", "model")


def test_missing_and_repeated_options_list_the_valid_ones() -> None:
    with pytest.raises(BadOption, match=r"needs option 'period'(.|\n)*period=int \(required\)"):
        registry.build(ROWS, "local-sgd", "strategy", world=None)
    with pytest.raises(BadOption, match=r"twice(.|\n)*period=int \(required\)"):
        registry.build(ROWS, "local-sgd:period=1,period=1", "strategy", world=None)


def test_context_fills_parameters_and_is_not_the_users_to_set() -> None:
    world = object()
    built = registry.build(ROWS, "local-sgd:period=4", "strategy", world=world, seed=9, other=1)
    assert built == Local(world, 4, 9)
    assert registry.build(ROWS, "local-sgd:period=4,seed=3", "strategy", world=world).seed == 3
    for option in ("seed=1", "world=1", "other=1"):
        with pytest.raises(BadOption, match="set by hpcsgd"):
            registry.build(ROWS, f"local-sgd:period=4,{option}", "strategy", world=world, seed=9, other=1)
    with pytest.raises(BadOption, match="no option 'world'"):
        registry.build(ROWS, "local-sgd:period=4,world=1", "strategy")


def test_a_value_that_the_row_refuses_is_a_bad_option() -> None:
    with pytest.raises(BadOption, match=r"picky.*size must be positive"):
        registry.build(ROWS, "picky:size=-1", "row")
    with pytest.raises(HpcsgdError, match="size is too large") as caught:
        registry.build(ROWS, "picky:size=10", "row")
    assert not isinstance(caught.value, BadOption)


def test_described_options_build_the_defaults() -> None:
    described = {name: (options, line) for name, options, line in registry.describe(ROWS)}
    options, line = described["everything"]
    assert line == "Give back every option."
    assert registry.build(ROWS, f"everything:{options}", "row") == everything()
    assert set(registry.parse(f"x:{options}")[1]) == set(inspect.signature(everything).parameters)
    assert described["local-sgd"] == ("period=INT,seed=0", "Average every few steps.")
    assert described["2nn"][0] == ""
    assert described["frozen"][0].startswith("count=7,")
    hidden = registry.describe(ROWS, hidden=("seed",))
    assert ("local-sgd", "period=INT", "Average every few steps.") in hidden
