"""Limits: each option of each command, spec, file, variable and constructor is fed what it cannot mean.

The options come from the parsers and registries, so that one that is added later is fed as well. A number is
never NaN, infinite, negative, huge, empty or a word, whatever its declaration; the exceptions are named here.
"""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import click
import pytest
import torch

from hpcsgd import Run, World, compress, registry, strategies, topology
from hpcsgd.commands import cli, sbatch, signals
from hpcsgd.commands.options import OPTIMIZERS, ShortCount, Value, ValueByName, Values
from hpcsgd.commands.train import settings, trainer
from hpcsgd.commands.tune import teleportation
from hpcsgd.errors import BadOption
from hpcsgd.mpi import environment, launcher
from hpcsgd.registry import Accepted, Within
from hpcsgd.strategies.delays import DELAYS
from hpcsgd.training.checkpoint.checkpoints import Checkpoints
from hpcsgd.training.data import DATASETS, loader, partition
from hpcsgd.training.models import MODELS
from tests.support.launch import CLI, UNCOMPILED, _environment

TEXTS = ["nan", "inf", "-inf", "0", "-1", "-1.5", "1e308", "1e400", "9" * 30, "9" * 5000, "", "word", "a\nb"]
OBJECTS: list[Any] = [*map(float, ["nan", "inf", "-inf"]), 0, -1, -1.5, 1e308, 10**30, 10**5000, "", "a\nb"]
OBJECTS += ["word", None, True, b"1", [1], {}, object()]
#: Values that no number is; zero may be one, and a bucket may be infinite.
NO_NUMBERS = {*TEXTS} - {"0"}
INFINITE = {"bucket_mib": {"inf", "1e308", "1e400", "9" * 30, "9" * 5000}}

#: Each registry: its rows, the word for one, and the parameters that are no options.
REGISTRIES: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "strategy": (strategies.STRATEGIES, "strategy", ()),
    "compression": (compress.COMPRESSORS, "compression scheme", ()),
    "delays": (DELAYS, "delays", ()),
    "topology": (topology.TOPOLOGIES, "topology", ("size",)),
    "data": (DATASETS, "data set", ()),
    "model": (MODELS, "model", ("shape", "classes")),
    "optimizer": (OPTIMIZERS, "optimizer", ("params", "lr")),
}
ROWS = [(name, row) for name, (rows, *_) in REGISTRIES.items() for row in rows]
MODEL = torch.nn.Linear(2, 1)
#: Constructors and functions whose arguments are settings of a run, and the arguments that they need.
CONSTRUCTORS: dict[Callable[..., Any], dict[str, Any]] = {
    Run: {"model": MODEL, "optimizer": torch.optim.SGD(MODEL.parameters(), 0.1)},
    World: {},
    Checkpoints: {"folder": Path("x"), "rank": 0, "ranks": 1, "gather": None},
    loader.Loader: {"source": None, "batch": 1},
    partition.partition: {"labels": None, "samples": 1, "ranks": 1, "alpha": None, "seed": 0, "epoch": 0},
    sbatch.SlurmJob: {},
}


def leaves(kind: Any) -> Iterator[Any]:
    """The kinds of which a value is one, or has elements."""
    if get_origin(kind) in (Annotated, Literal) or not get_args(kind):
        yield kind
    else:
        for member in get_args(kind):
            yield from leaves(member)


def is_number(kind: Any) -> bool:
    """Whether nothing but numbers, and perhaps words, is meant."""
    bases = {get_args(leaf)[0] if get_origin(leaf) is Annotated else leaf for leaf in leaves(kind)}
    return bool(bases & {int, float}) and not bases & {str, Path}


def options_of(function: Callable[..., Any], hidden: Sequence[str] = ()) -> dict[str, Any]:
    """The annotation of each parameter that is an option."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    found = {p.name: p.annotation for p in parameters if p.name not in hidden}
    return {name: kind for name, kind in found.items() if registry.values.is_option(kind)}


def must_be_refused(name: str, kind: Any, text: str) -> bool:
    """Whether a value is wrong, whatever the limits of the option."""
    if text == "a\nb":
        return True
    if is_number(kind):
        return text in NO_NUMBERS - INFINITE.get(name, set())
    return get_origin(kind) is Literal or (text == "" and kind is Path)


def is_one_line(message: str) -> bool:
    return "\n" not in message.strip() and len(message) < 1200


# The declarations.


def declared() -> Iterator[tuple[str, Any]]:
    """Each option that is declared anywhere, and its kind."""
    for name, row in ROWS:
        rows, _, hidden = REGISTRIES[name]
        for option, kind in options_of(rows[row], hidden).items():
            yield f"{name} {row}: {option}", kind
    for function in CONSTRUCTORS:
        for option, kind in options_of(function).items():
            yield f"{function.__name__}: {option}", kind
    for option, kind in settings.KINDS.items():
        yield f"--{option}", kind
    for variable, (kind, _) in environment.VARIABLES.items():
        yield variable, kind
    for words, parameter in COMMAND_OPTIONS:
        if isinstance(parameter.type, Value):
            yield f"{' '.join(words)} {parameter.name}", parameter.type.kind


def commands(group: click.Group, *words: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *words, name)
        else:
            yield (*words, name), command


COMMANDS = dict(commands(cli.cli))
COMMAND_OPTIONS = [(words, parameter) for words, command in COMMANDS.items() for parameter in command.params]
#: Ranks in a loop over ranks, and others that code sets: any number is one.
NO_SETTINGS = {"rank", "ranks", "samples"}


def test_each_number_has_a_least_and_a_largest_value() -> None:
    without = [
        name
        for name, kind in declared()
        for leaf in leaves(kind)
        if leaf in (int, float) and name.split()[-1] not in NO_SETTINGS
    ]
    assert not without


def test_an_option_of_a_command_has_one_of_our_types() -> None:
    for words, parameter in COMMAND_OPTIONS:
        is_setting = parameter.name in settings.FIELDS and words[0] in ("train", "tune")
        is_flag = isinstance(parameter, click.Option) and parameter.is_flag
        assert is_flag or is_setting or isinstance(parameter.type, Value), (words, parameter.name)


def test_the_ends_of_a_range_belong_to_it_and_what_is_beyond_does_not() -> None:
    ranges = {leaf for _, kind in declared() for leaf in leaves(kind) if Within in map(type, get_args(leaf))}
    assert len(ranges) > 20
    for kind in ranges:
        base, limits = get_args(kind)
        for end, beyond in ((limits.least, -1), (limits.largest, 1)):
            if math.isinf(end):
                continue
            assert registry.check("", base(end), kind) == end == registry.convert(str(base(end)), kind)
            with pytest.raises(BadOption, match="expected a"):
                registry.check("", base(end) + (1 if base is int else abs(end) + 1) * beyond, kind)


# Commands.


class Reached(Exception):
    """The command line was accepted, and the command begins."""


def reach(*_: Any, **__: Any) -> None:
    raise Reached


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str | None]:
    """`parse(words)`: None if a command line is accepted, else its error, with exit status 2."""
    for module in (trainer, teleportation):
        monkeypatch.setattr(module, "train" if module is trainer else "search", reach)
    for words, command in COMMANDS.items():
        if words[0] not in ("train", "tune"):
            monkeypatch.setattr(command, "callback", reach)
    monkeypatch.setattr(signals, "defer_sigusr1", lambda: None)
    monkeypatch.setattr(launcher, "rank", lambda: 0)
    monkeypatch.setattr(cli, "_mpi_is_up", lambda: False)

    def run(*words: str) -> str | None:
        monkeypatch.setattr(sys, "argv", ["hpcsgd", *words])
        with pytest.raises((SystemExit, Reached)) as end:
            cli.main()
        error = capsys.readouterr().err
        assert not isinstance(end.value, SystemExit) or end.value.code == 2, (words, end.value.code, error)
        return error if isinstance(end.value, SystemExit) else None

    return run


def command_line(
    words: tuple[str, ...], command: click.Command, fed: click.Parameter, text: str
) -> list[str]:
    """The words of a command with a text for one parameter, and whatever it needs besides."""
    line = list(words)
    for parameter in command.params:
        if parameter is not fed and parameter.required:
            valid = str((*get_args(getattr(parameter.type, "kind", None)), "x")[0])
            line += [valid] if isinstance(parameter, click.Argument) else [f"{parameter.opts[0]}={valid}"]
    if isinstance(fed, click.Argument):
        return [*line, "--", text]
    return [*line, f"{max(fed.opts, key=len)}={text}"]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_refuses_values_in_one_line_with_status_2(
    words: tuple[str, ...], parse: Callable[..., str | None]
) -> None:
    command = COMMANDS[words]
    wrong = []
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.is_flag:
            continue
        name = str(parameter.name)
        kind = parameter.type.kind if isinstance(parameter.type, Value) else settings.KINDS[name]
        for text in TEXTS:
            if name == "resume" and text != "a\nb":
                continue  # the settings of another run
            error = parse(*command_line(words, command, parameter, text))
            if error is None and must_be_refused(name, kind, text):
                wrong.append(f"{name}={text!r} is accepted")
            elif error is not None and not (is_one_line(error) and error.startswith("hpcsgd: ")):
                wrong.append(f"{name}={text!r}: {error!r}")
    assert not wrong


def test_lists_and_shortened_numbers_are_read_element_by_element() -> None:
    numbers = Annotated[int, Within(1, 100)]
    assert Values(numbers).convert("1, 5", None, None) == [1, 5]
    assert ValueByName(numbers).convert("a=1,b=c=5", None, None) == {"a": 1, "b=c": 5}
    assert ShortCount(Annotated[int, Within(1, 10**7)]).convert("1.5k", None, None) == 1500
    wrong: list[tuple[Value, str]] = [(Values(numbers), text) for text in ("1,0", "1,1", ",", "")]
    wrong += [(ValueByName(numbers), "a=1,b"), (ValueByName(numbers), "a=0"), (ValueByName(numbers), "")]
    wrong += [(ShortCount(numbers), text) for text in ("1k", "k", "1e400", "nank", "-1", "0.4")]
    for kind, text in wrong:
        with pytest.raises(click.UsageError, match=r"expected .* from 1 to 100"):
            kind.convert(text, None, None)


# Specs, and the constructors that they reach.


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_spec_refuses_values_in_one_line(name: str, row: str) -> None:
    rows, word, hidden = REGISTRIES[name]
    for option, kind in options_of(rows[row], hidden).items():
        for text in TEXTS:
            if "," in text or any(type(each) is Accepted for leaf in leaves(kind) for each in get_args(leaf)):
                continue
            try:
                registry.bind(rows, f"{row}:{option}={text}", word, **dict.fromkeys(hidden))
                assert not must_be_refused(option, kind, text), f"{row}:{option}={text!r} is accepted"
            except BadOption as error:
                assert is_one_line(str(error)) and repr(option) in str(error), error


@pytest.mark.parametrize(
    "spec",
    [
        "dsgd:topology=base:k=0",
        "sgp:topology=torus:rows=-1",
        "adpsgd:topology=ring:k=3",
        "backup:backups=-1",
        "backup:delays=slow:peer=-1",
        "backup:delays=pareto:shape=nan",
        "teleport:active=4x0",
        "teleport:active=0",
        "lasgd:period=8,max_lag=4",
        "ps:mode=elastic,alpha=1",
    ],
)
def test_a_spec_inside_of_a_spec_is_read_with_it(spec: str) -> None:
    with pytest.raises(BadOption) as error:
        strategies.build(spec)
    assert is_one_line(str(error.value)) and re.search("expected|has no option", str(error.value))


def test_a_wrapper_wraps_once() -> None:
    for spec in ("ef+" * 500 + "maxnorm", "hadamard+ef+hadamard+maxnorm"):
        with pytest.raises(BadOption, match="twice") as error:
            compress.build(spec)
        assert is_one_line(str(error.value))
    assert compress.build("hadamard+ef+maxnorm") and compress.build("ef+hadamard+maxnorm")


def refused_objects(option: str, kind: Any) -> Iterator[Any]:
    """Python values that an option must refuse, and that its declaration does not have."""
    for value in OBJECTS:
        try:
            registry.check("", value, kind)
        except BadOption:
            yield value
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            assert not (number and is_number(kind)) or value == 0 or option in INFINITE, (option, value)


@pytest.mark.parametrize(("name", "row"), [row for row in ROWS if row[0] != "optimizer"])
def test_a_constructor_refuses_the_same_values(name: str, row: str) -> None:
    rows, _, hidden = REGISTRIES[name]
    context = {"size": 4, "shape": (3, 8, 8), "classes": 3}
    given = {key: context[key] for key in hidden}
    required = {"path": Path("x")} if row == "file" else {}
    for option, kind in options_of(rows[row], hidden).items():
        for value in refused_objects(option, kind):
            with pytest.raises(ValueError, match=rf"'{option}'|name before|unknown|option") as error:
                rows[row](**given | required | {option: value})
            assert is_one_line(str(error.value)), error.value


@pytest.mark.parametrize("function", CONSTRUCTORS, ids=lambda function: function.__name__)
def test_a_run_and_its_parts_refuse_wrong_values_before_anything_else(function: Callable[..., Any]) -> None:
    for option, kind in options_of(function, (*NO_SETTINGS,)).items():
        for value in refused_objects(option, kind):
            with pytest.raises(BadOption, match=rf"option '{option}' of .* has a wrong value|limit") as error:
                function(**CONSTRUCTORS[function] | {option: value})
            assert is_one_line(str(error.value))


# Files and variables.

TOML = ["nan", "inf", "-inf", "0", "-1", "1e308", "9" * 30, '""', '"word"', '"a\\nb"', "true", "[1]"]
TOML += ["{a = 1}", "1979-05-27", '["digits"]']


@pytest.mark.parametrize("name", settings.FIELDS)
def test_a_file_refuses_values_in_one_line(name: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    for text in TOML:
        file.write_text(f"{name} = {text}\n")
        try:
            settings.validate(settings.merge(settings.from_toml(file), {}))
        except BadOption as error:
            assert is_one_line(str(error)), error
        else:
            kind = settings.KINDS[name]
            assert text[0] not in "t[{" and text != "1979-05-27", f"{name} = {text} is accepted"
            assert not must_be_refused(name, kind, text.strip('"').replace("\\n", "\n")), f"{name} = {text}"


@pytest.mark.parametrize("variable", environment.VARIABLES)
def test_a_variable_refuses_values_in_one_line(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, default = environment.VARIABLES[variable]
    for text in filter(None, TEXTS):
        monkeypatch.setenv(variable, text)
        try:
            environment.check_variables()
            assert not must_be_refused(variable, kind, text), f"{variable}={text} is accepted"
            assert kind is not bool or text == "0"
        except BadOption as error:
            assert is_one_line(str(error)) and variable in str(error)
    monkeypatch.setenv(variable, "")
    assert environment.read(variable) == default


# Real processes.

WRONG = [
    ("train", "--epochs", "1e308"),
    ("train", "--timeout", "1e300"),
    ("train", "--batch", "9" * 30),
    ("train", "--threads", "1000000"),
    ("train", "--compress", "ef+" * 500 + "maxnorm"),
    ("train", "--model", "2nn:width=0"),
    ("train", "--strategy", "backup:backups=-1"),
    ("train", "--name", "a\nb"),
    ("bench", "step", "--repeats", "0"),
    ("HPCSGD_TIMEOUT=nan", "train"),
]


@pytest.mark.timeout(110)
def test_processes_end_with_status_2_and_one_line(tmp_path: Path) -> None:
    """One process for all, but for the first: the import of torch takes seconds."""
    script = CLI + (
        "import os, hpcsgd.commands.train.trainer\n"
        "for words in eval(sys.argv[1]):\n"
        "    if os.fork() == 0:\n"
        "        os.environ |= [word.split('=') for word in words if 'HPCSGD' in word]\n"
        "        sys.argv[1:] = [word for word in words if 'HPCSGD' not in word]\n"
        "        main()\n"
        "    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)\n"
    )
    words = [sys.executable, "-c", UNCOMPILED + script, repr(WRONG)]
    alone = _environment("", {})  # as one of several ranks it would leave the error to rank 0
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=tmp_path, env=alone)
    assert re.findall(r"^\d$", done.stdout, re.M) == ["2"] * len(WRONG), done
    lines = done.stderr.splitlines()
    assert len(lines) == len(WRONG) and all(line.startswith("hpcsgd: ") for line in lines), done
    assert not list(tmp_path.iterdir())
