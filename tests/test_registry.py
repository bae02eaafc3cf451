"""Specs: what is written is what is built, and what cannot be built names what can."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd import registry
from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.registry import Within


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
def test_values_of_the_wrong_type_are_refused_with_the_right_ones(written: str) -> None:
    key, _, text = written.partition("=")
    kinds = inspect.signature(everything, eval_str=True).parameters
    expected = f"expected {registry.expected(kinds[key].annotation)}, got {text!r}"
    message = f"option {key!r} of row 'everything' has a wrong value: {expected}"
    with pytest.raises(BadOption, match=re.escape(message)):
        registry.build(ROWS, f"everything:{written}", "row")


def test_kinds_of_values_in_words() -> None:
    kinds = inspect.signature(everything, eval_str=True).parameters
    assert {key: registry.expected(p.annotation) for key, p in kinds.items()} == {
        "count": "a whole number",
        "rate": "a number",
        "nested": "yes or no",
        "label": "a text",
        "folder": "a path",
        "mode": "one of pull, push",
        "limit": "a number, or none",
        "shape": "one or more joined by x, each a whole number",
        "betas": "2 joined by x, each a number",
    }
    optional = Annotated[int, Within(1, 10**6)] | None
    assert registry.expected(optional) == "a whole number from 1 to 1e6, or none"
    assert registry.expected(Annotated[float, Within(0.5, 2**20 + 1)]) == "a number from 0.5 to 1048577"
    assert registry.expected(Annotated[float, Within(-1e-5, math.inf)]) == "a number from -1e-5 to inf"


@pytest.mark.parametrize(
    ("value", "kind", "found"),
    [
        (np.int64(3), int, 3),
        (np.float32(0.5), float, 0.5),
        (2, float, 2.0),
        ([1, 2], tuple[int, ...], (1, 2)),
        (None, int | None, None),
        (Plain(), Plain | str | None, ...),
        ("auto", int | Literal["auto"], "auto"),
        ("a", Path, "a"),
    ],
)
def test_objects_are_checked_as_texts_are(value: object, kind: object, found: object) -> None:
    got = registry.check("option", value, kind)
    assert got is value if found is ... else got == found and type(got) is type(found)


@pytest.mark.parametrize(
    ("value", "kind"), [(True, int), (1, bool), (1.0, int), ((), tuple[int, ...]), (1, Plain | str | None)]
)
def test_objects_of_other_types_are_refused(value: object, kind: object) -> None:
    with pytest.raises(BadOption, match="option has a wrong value: expected"):
        registry.check("option", value, kind)


@registry.checked
def sample(size: Annotated[int, Within(1, 9)] = 3, *, rate: float = 0.5, row: Plain | None = None) -> float:
    return size * rate


def test_a_checked_function_is_the_same_but_for_wrong_values() -> None:
    assert sample() == 1.5 and sample(2, rate=2) == 4.0 and sample(row=Plain()) == 1.5
    assert registry.describe({"sample": sample})[0][1] == "size=3,rate=0.5"
    with pytest.raises(BadOption, match=r"option 'size' of sample has a wrong value: .* 1 to 9, got 10"):
        sample(10)
    with pytest.raises(TypeError, match="sizes"):
        sample(sizes=1)  # type: ignore[call-arg]


def test_annotations_of_another_package_get_limits() -> None:
    rows = {"fraction": registry.limited(everything, rate=Annotated[float, Within(0, 1)])}
    assert registry.build(rows, "fraction:rate=1", "row")["rate"] == 1.0
    with pytest.raises(BadOption, match="from 0 to 1"):
        registry.build(rows, "fraction:rate=1.5", "row")


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
