"""Command lines of the documentation, parsed as the programs that they name would, without running them."""

from __future__ import annotations

import configparser
import functools
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from hpcsgd import topology as topologies
from hpcsgd.commands.cli import cli
from hpcsgd.commands.train.click_options import click_options
from hpcsgd.commands.train.settings import FIELDS
from hpcsgd.errors import HpcsgdError

ROOT = Path(__file__).resolve().parents[2]

#: Programs whose arguments are not checked.
_FOREIGN = {".", "export", "ls", "module", "scancel", "kill", "dmesg"}
_MPIEXEC = {"-n", "--host", "-hosts", "--with-ft", "--bind-to"}  # each with a value
_SBATCH = {"--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--gpus-per-node", "--array"}
_SBATCH |= {"--time", "--wait"}
#: Scripts that are no part of the repository.
_USERS = {"train.py"}
#: Arguments of the scripts in jobs/: how many come first, and the command whose options follow.
_JOBS: dict[str, tuple[int, tuple[str, ...]]] = {
    "train.sbatch": (0, ("train",)),
    "requeue.sbatch": (0, ("train",)),
    "array.sbatch": (1, ("train",)),
    "ps_group.sbatch": (0, ("train",)),
    "ps_server.sbatch": (0, ("serve",)),
    "mpirun.sh": (0, ("train",)),
    "ps_local.sh": (2, ("train",)),
    "async.sh": (1, ("bench", "async")),
    "ps.sh": (1, ("bench", "ps")),
    "slow_link.sh": (1, ()),
    "compress.sh": (1, ()),
}
#: Scripts of jobs/ that pass their arguments to a program in Python, and the file of its options.
_PROGRAMS = {"gpu_check.sh": "jobs/gpu_check/__main__.py"}


class Wrong(AssertionError):
    """A command line that would not run."""


def check(script: str) -> None:
    """Check every command of a shell script.

    Raises
    ------
    Wrong
        An unknown program, file, option or value.
    """
    for words in _commands(script):
        _check(words)


def check_names(command: str) -> None:
    """Check the commands and options that a piece of prose names; options may lack their values.

    Raises
    ------
    Wrong
        There is no such command, option or script.
    """
    for words in _commands(command):
        if "hpcsgd" in words:
            _parse(words[words.index("hpcsgd") + 1 :], complete=False)
        elif words[0] == "mpiexec":
            _check([*words, "ls"])
        else:
            _check(words)


def _commands(script: str) -> Iterator[list[str]]:
    script = re.sub(r'"?\$\((?:which|command -v) hpcsgd\)"?', "hpcsgd", script.replace("\\\n", " "))
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        words: list[str] = []
        try:
            tokens = list(lexer)
        except ValueError as error:
            raise Wrong(f"{line}: {error}") from None
        for token in [*tokens, ";"]:
            if token not in (";", "&", "&&", "|", "||"):
                words.append(token)
            elif words:
                yield _without_redirections(words)
                words = []


def _without_redirections(words: list[str]) -> list[str]:
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if not {before, word} & {">", ">>", "<"}
    ]


def _check(words: list[str]) -> None:
    variables = []
    while words and re.match(r"[A-Z_]+=", words[0]):
        variables.append(words.pop(0).partition("=")[0])
    _require(bool(words), f"nothing is run with {variables}")
    program, *rest = words
    if program in _FOREIGN:
        return
    programs: dict[str, Callable[[list[str]], None]] = {
        "hpcsgd": _parse,
        "python": _python,
        "python3": _python,
        "pip": _pip,
        "mpiexec": _mpiexec,
        "srun": _srun,
        "sbatch": _sbatch,
    }
    for name in variables:
        _require(_is_read(name, words), f"no program of {' '.join(words)!r} reads {name}")
    if program in programs:
        programs[program](rest)
    else:
        _require(program.startswith("jobs/"), f"unknown program {program!r}")
        _job(program, rest)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise Wrong(problem)


def _is_read(variable: str, words: list[str]) -> bool:
    """Whether the script of jobs/ in a command, or hpcsgd, reads an environment variable."""
    scripts = [ROOT / word for word in words if word.startswith("jobs/") and (ROOT / word).is_file()]
    inside = any(re.search(rf"\b{variable}\b", script.read_text()) for script in scripts)
    return inside or variable in {"OMP_NUM_THREADS", *_variables()}


@functools.cache
def _variables() -> set[str]:
    texts = (path.read_text() for path in (ROOT / "hpcsgd").rglob("*.py"))
    return {name for text in texts for name in re.findall(r"HPCSGD_[A-Z_]+", text)}


@functools.cache
def _setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def _mpiexec(words: list[str]) -> None:
    while words and words[0].startswith("-"):
        _require(words[0] in _MPIEXEC and len(words) > 1, f"mpiexec: option {words[0]!r}")
        words = words[2:]
    _check(words)


def _srun(words: list[str]) -> None:
    while words and words[0].startswith("--"):
        words = words[1:]
    _check(words)


def _sbatch(words: list[str]) -> None:
    while words and words[0].startswith("-"):
        _require(words[0].partition("=")[0] in _SBATCH, f"sbatch: option {words[0]!r}")
        words = words[1:]
    _require(bool(words), "sbatch: no script")
    _job(words[0], words[1:])


def _job(script: str, words: list[str]) -> None:
    path = ROOT / script
    if path.is_file() and path.name in _PROGRAMS:
        _python([_PROGRAMS[path.name], *words])
        return
    _require(path.is_file() and path.name in _JOBS, f"there is no job script {script!r}")
    first, command = _JOBS[path.name]
    for _ in range(first):
        words = words[1:] if words and not words[0].startswith("-") else words
    if command:
        _parse([*command, *words])
    else:
        _require(not words, f"{script} has no arguments {words}")


def _python(words: list[str]) -> None:
    if words[:1] == ["-c"]:
        compile(words[1], "python -c", "exec")
    elif words[:1] == ["-m"]:
        _module(words[1], words[2:])
    elif words and words[0] not in _USERS:
        script = ROOT / words[0]
        _require(script.is_file(), f"there is no script {words[0]!r}")
        end = words.index("--") if "--" in words else len(words)
        for option in (word for word in words[1:end] if word.startswith("-")):
            _require(f'"{option}"' in script.read_text(), f"{words[0]} has no option {option!r}")
        if end < len(words):
            _check(words[end + 1 :])


def _module(module: str, words: list[str]) -> None:
    if module == "hpcsgd":
        _parse(words)
    elif module == "pytest":
        _pytest(words)
    elif module.startswith("tests."):
        _python([f"{module.replace('.', '/')}/__main__.py", *words])
    else:
        _require(module == "venv", f"python -m {module}")


def _pytest(words: list[str]) -> None:
    lines = _setup()["tool:pytest"]["markers"].splitlines()
    markers = {re.split(r"[:(]", line)[0].strip() for line in lines} | {"mpi", "or", "and", "not"}
    while words:
        if words[0] == "-m":
            unknown = set(re.findall(r"\w+", words[1])) - markers
            _require(not unknown, f"pytest: no markers {unknown}")
            words = words[2:]
            continue
        if not words[0].startswith("-"):
            _require((ROOT / words[0].partition("::")[0]).exists(), f"there are no tests {words[0]!r}")
        words = words[1:]


def _pip(words: list[str]) -> None:
    for word in words:
        extras = re.fullmatch(r"\.\[([\w,]+)\]", word)
        unknown = set(extras[1].split(",") if extras else ()) - set(_setup()["options.extras_require"])
        _require(not unknown, f"pip: no extras {unknown}")
        _require(not word.endswith(".txt") or (ROOT / word).is_file(), f"there is no {word!r}")


def _parse(words: list[str], complete: bool = True) -> None:
    """Check the arguments of `hpcsgd`; not `complete`: only that its commands and options exist."""
    command: click.Command = cli
    path = ["hpcsgd"]
    context = click.Context(cli, info_name="hpcsgd")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        path.append(words[0])
        inner = command.get_command(context, words[0])
        _require(inner is not None, f"there is no command {' '.join(path)!r}")
        command, words = inner or command, words[1:]
        context = click.Context(command, info_name=path[-1], parent=context)
    own = words[: words.index("--")] if "--" in words else words
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {
        "--help",
        "-h",
        "--version",
    }
    for option in (word.partition("=")[0] for word in own if re.match(r"--?[a-z]", word)):
        _require(option in known, f"{' '.join(path)} has no option {option!r}")
    if not complete or {"--help", "-h", "--version"} & set(own):
        return
    _require(not isinstance(command, click.Group), f"{' '.join(path)} lacks a command")
    try:
        parsed = command.make_context(path[-1], list(words), parent=context.parent)
        _check_values(path[1:], parsed.params)
    except click.ClickException as error:
        raise Wrong(f"{' '.join([*path, *words])}: {error.format_message()}") from error
    except HpcsgdError as error:
        raise Wrong(f"{' '.join([*path, *words])}: {error}") from error


_settings = click_options(lambda settings, **_: settings)


def _check_values(path: list[str], params: Mapping[str, Any]) -> None:
    if path in (["train"], ["tune", "teleportation"]):
        given = {name: params[name] for name in FIELDS}
        if given["resume"]:
            given |= {"resume": "auto", "name": given["name"] or "run"}  # its folder need not exist
        _settings(**given, config=None, element=None)
    elif path[0] == "sbatch" and params["kind"] == "train":
        for arguments in (value for value in params.values() if isinstance(value, tuple)):
            _parse(["train", *arguments])
    elif path[0] == "topology" and params["name"]:
        topologies.build(params["name"], params["peers"])
