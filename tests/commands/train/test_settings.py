"""Settings: written ones are read again, the command line takes precedence, errors list the valid values."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from hpcsgd import errors
from hpcsgd.commands.train import settings as module
from hpcsgd.commands.train.click_options import click_options
from hpcsgd.commands.train.command import train
from hpcsgd.commands.train.settings import (
    FIELDS,
    KINDS,
    Settings,
    default_model,
    from_toml,
    merge,
    to_toml,
    validate,
)
from hpcsgd.errors import BadOption
from hpcsgd.registry import Text

#: Specs of each setting that takes one.
SPECS = {
    "data": ["digits", "text:context=8", "mnist:path=a b/c"],
    "model": ["", "mine.models:Net:depth=3"],
    "strategy": ["allreduce", "dsgd:topology=base:k=2,overlap=yes"],
    "compress": ["none", "ef+maxnorm:bits=4"],
    "optimizer": ["sgd", "adam:betas=0.8x0.9"],
    "delays": ["none", "slow:peer=1,factor=2"],
}
#: Whatever is no control character, separator of lines, or surrogate.
TEXT = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))


def values(name: str) -> st.SearchStrategy[Any]:
    """Values that a setting may take, from its declaration alone, but for specs."""
    return st.sampled_from(SPECS[name]) if name in SPECS else of_kind(KINDS[name])


def of_kind(kind: Any) -> st.SearchStrategy[Any]:
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if type(None) in get_args(kind):
        return of_kind(get_args(kind)[0]) | st.none()
    base, limits = (kind, Text()) if kind is str else get_args(kind)
    if base is str:
        return st.text(TEXT, min_size=limits.shortest, max_size=8)
    infinite = {"allow_infinity": False} if limits.largest < math.inf else {}
    return {int: st.integers, float: partial(st.floats, **infinite)}[base](limits.least, limits.largest)


VALID = st.builds(Settings, **{name: values(name) for name in FIELDS})


@examples(deadline=None)
@given(VALID)
def test_what_is_written_can_be_run_again(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_bytes(to_toml(settings, {"ranks": 4, "nodes": ["a", "b"]}).encode())
        read = from_toml(file)
    assert set(read) == set(FIELDS)
    assert merge(read, {}) == settings
    assert validate(settings) == settings


def test_the_defaults_are_valid_and_fit_the_data() -> None:
    assert validate(merge({}, {})) == validate(Settings()) == Settings()
    assert default_model("digits") == "2nn"
    assert default_model("cifar10:folder=a/b") == "resnet20"
    with pytest.raises(BadOption, match="'mine' has no default model"):
        default_model("mine")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults() -> None:
    merged = validate(merge({"batch": 8, "epochs": 2, "alpha": 0.5}, {"batch": 16, "alpha": None}))
    assert merged == Settings(batch=16, epochs=2.0, alpha=None)
    assert type(merged.epochs) is float


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch", 0, "a whole number from 1 to 1e9"),
        ("batch", 1.0, "a whole number"),
        ("batch", True, "a whole number"),
        ("batch", None, "a whole number"),
        ("seed", 2**32, "from 0 to 4294967295"),
        ("learning_rate", -0.1, "a number from 0 to 1e9"),
        ("learning_rate", float("nan"), "a number"),
        ("timeout", float("inf"), "a number"),
        ("epochs", 10**400, "a number"),
        ("epochs", "2", "a number"),
        ("alpha", 0.0, "a number from 1e-6 to 1e6, or none"),
        ("name", "a\nb", "without control characters"),
        ("schedule", "Cosine", "one of constant, cosine, step"),
        ("algorithm", 3, "one of auto, library, ring, node, two-level"),
        ("data", 3, "a text"),
        ("data", None, "a text"),
        ("data", ["digits"], "a text"),
    ],
)
def test_bad_values_name_the_option_and_what_is_valid(name: str, value: Any, expected: str) -> None:
    with pytest.raises(BadOption) as caught:
        validate(merge({name: value}, {}))
    message = str(caught.value)
    assert repr(name) in message and expected in message and errors.shown(value) in message
    assert "\n" not in message
    with pytest.raises(BadOption, match=name):
        validate(dataclasses.replace(Settings(), **{name: value}))


def test_unknown_names_are_answered_with_the_closest_first_and_then_all(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("learning-rate = 0.1\n")
    with pytest.raises(BadOption, match=r"bad\.toml: unknown option 'learning-rate'") as caught:
        from_toml(file)
    listed = str(caught.value).partition("use one of: ")[2].split(", ")
    assert listed[0] == "learning_rate"
    assert sorted(listed) == sorted(FIELDS)
    with pytest.raises(BadOption, match="unknown option 'bach'"):
        merge({}, {"bach": 1})


def test_names_of_other_programs_lead_to_ours() -> None:
    for name, ours in module.NAMES_ELSEWHERE.items():
        assert ours in FIELDS and name not in FIELDS
        flag = f"--{name.replace('_', '-')}"
        result = CliRunner().invoke(train, [flag, "1"], standalone_mode=False)
        assert isinstance(result.exception, click.NoSuchOption), flag
        assert f"Did you mean '--{ours.replace('_', '-')}'?" in result.exception.format_message()
    with pytest.raises(BadOption, match="unknown option 'lr'; use one of: learning_rate, "):
        merge({"lr": 0.1}, {})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    for content in (b"batch = ", b"batch = 1\nbatch = 2\n", b"data = '\xff'"):
        broken.write_bytes(content)
        with pytest.raises(BadOption, match=r"cannot read settings from .*broken\.toml"):
            from_toml(broken)
    with pytest.raises(BadOption, match=r"absent\.toml"):
        from_toml(tmp_path / "absent.toml")


@click.command()
@click.argument("label")
@click_options
def command(label: str, settings: Settings) -> None:
    click.echo(label + "\n" + to_toml(settings, {}), nl=False)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command, ["label", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.partition("label\n")[2]


@examples(deadline=None)
@given(VALID)
def test_the_command_line_sets_every_field(settings: Settings) -> None:
    settings = dataclasses.replace(settings, resume="")  # which would name a run's own settings
    flags = (
        f"--{name.replace('_', '-')}={'none' if value is None else value}"
        for name, value in dataclasses.asdict(settings).items()
    )
    assert run(*flags) == to_toml(settings, {})


def test_flags_override_the_config_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(to_toml(Settings(batch=8, alpha=0.3, clip=1.0), {"ranks": 4}))
    found = run("--config", str(file), "--batch", "16", "--alpha", "none")
    assert found == to_toml(Settings(batch=16, clip=1.0), {})
    assert run() == to_toml(Settings(), {})


@pytest.mark.parametrize("flags", [["--batch", "many"], ["--batch", "0"], ["--batch", "1.5"]])
def test_the_command_line_and_files_get_the_same_errors(flags: list[str]) -> None:
    with pytest.raises(BadOption, match=r"'batch'.*a whole number from 1 to 1e9"):
        run(*flags)


def test_help_shows_every_option_with_unit_range_and_default() -> None:
    shown = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    for name, field in FIELDS.items():
        assert f"--{name.replace('_', '-')} " in shown
        assert field.metadata["help"] in shown
        if get_origin(KINDS[name]) is Literal:
            assert all(choice in shown for choice in get_args(KINDS[name]))
    assert "--config FILE" in shown
    assert "[in epochs; a number from 0 to 1e9; default: 20.0]" in shown


ALONE = """
import sys, types
package = types.ModuleType("hpcsgd")
package.__path__ = [sys.argv[1]]
sys.modules["hpcsgd"] = package
import hpcsgd.commands.train.settings
sys.exit("torch" in sys.modules or "mpi4py" in sys.modules)
"""


def test_the_settings_need_neither_torch_nor_mpi() -> None:
    """Apart from `hpcsgd/__init__.py`, which may import both."""
    folder = str(Path(module.__file__).parents[2])
    command = [sys.executable, "-c", ALONE, folder]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
