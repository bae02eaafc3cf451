"""`hpcsgd topology`: right numbers, no MPI, no torch, and drawings."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hpcsgd.commands.cli import cli
from hpcsgd.commands.topology.tables import count_messages, steps_to_halve
from hpcsgd.errors import HpcsgdError
from hpcsgd.topology import TOPOLOGIES
from tests.support.launch import run_alone
from tests.support.topology_cases import SPECS, made, over_sizes


def run(*words: str) -> str:
    result = CliRunner().invoke(cli, ["topology", *words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def cell(output: str, name: str) -> str:
    (found,) = re.findall(rf"│ {name} +│ +(.*?) │", output)
    return str(found)


@pytest.mark.parametrize(
    ("words", "cells"),
    [
        (["ring", "-n", "8"], ("symmetric", "1", "2", "never", "16", "64.0 MB")),
        (["star", "-n", "5", "--parameters", "2M"], ("symmetric", "1", "1..4", "never", "8", "64.0 MB")),
        (["base:k=2", "-n", "9"], ("symmetric", "2", "2", "2 steps", "18", "72.0 MB")),
        (["one-peer-exponential"], ("directed", "4", "1", "4 steps", "16", "64.0 MB")),
        (["complete", "-n", "1"], ("symmetric", "1", "0", "1 step", "0", "0 bytes")),
    ],
)
def test_one_topology_is_described(words: list[str], cells: tuple[str, ...]) -> None:
    output = run(*words)
    names = ["weights", r"period \(steps\)", "models a peer reads a step", "exact mean after"]
    names += ["messages a step", "bytes a step"]
    assert tuple(cell(output, name) for name in names) == cells


def test_without_a_name_all_families_are_compared_and_the_impossible_say_why() -> None:
    output = run("-n", "7")
    assert all(re.search(rf"{name}\b", output) for name in TOPOLOGIES)
    assert "use 4 or 8 peers" in output and "random-regular:degree=3+seed=0: no regular graph" in output
    assert "hypercube" in run("-n", "8") and "use 4 or 8" not in run("-n", "8")


@pytest.mark.parametrize("spec", SPECS)
def test_steps_to_halve_halve_any_disagreement(spec: str) -> None:
    for topology in over_sizes(spec):
        steps = steps_to_halve(topology)
        assert steps is not None
        product = np.eye(topology.size)
        for step in range(steps):
            product = topology.matrix(step) @ product
        assert np.linalg.norm(product - 1 / topology.size, 2) <= 0.5 + 1e-9


def test_traffic_counts_each_model_once_for_who_reads_it() -> None:
    topology = made("base", 7)
    read = [[len(topology.sources(i, t)) for i in range(7)] for t in range(topology.period)]
    counts = count_messages(topology)
    assert (counts.least, counts.most) == (np.min(read), np.max(read))
    assert counts.messages == pytest.approx(np.sum(read) / topology.period)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ring", "-n", "0"], "from 1 to 4096"),
        (["ring", "--parameters", "many"], "--parameters"),
        (["ring", "--parameters", "0"], "--parameters"),
        (["ring", "--parameters", "inf"], "--parameters"),
        (["--png", "all.png"], "NAME"),
        (["rnig"], "unknown topology 'rnig'; use one of: .*random-regular"),
        (["ring", "--png", "ring.jpg"], r"\.png"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str) -> None:
    output = run(*words)
    assert re.search(message, output) and "Error" in output and "gap" not in output


@pytest.mark.parametrize("words", [["torus", "-n", "12"], ["base", "-n", "5"], ["exponential", "-n", "3"]])
def test_drawings_are_written(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "drawn.png"
    assert str(path) in run(*words, "--png", str(path)).replace("\n", "")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_drawing_has_a_panel_for_each_step_and_a_line_for_each_link() -> None:
    pytest.importorskip("matplotlib")
    from hpcsgd.commands.topology.drawing import draw

    topology = made("one-peer-exponential", 8)
    axes = draw(topology, "title").axes
    assert [len(panel.patches) for panel in axes] == [8, 8, 8]
    assert len(draw(made("ring", 9), "title").axes[0].patches) == 9
    assert made("base", 25).period == 9
    figure = draw(made("base", 25), "title")
    assert len(figure.axes) == 8 and "the first 8 of 9 steps" in figure.get_suptitle()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(HpcsgdError, match="cannot write"):
        run("ring", "--png", str(tmp_path / "none" / "ring.png"))


def test_it_needs_neither_mpi_nor_torch_nor_matplotlib(tmp_path: Path) -> None:
    code = """
import os, sys
os.chdir({folder!r})
for name in ("mpi4py", "torch", "matplotlib"):
    sys.modules[name] = None
from hpcsgd.commands.cli import main
sys.argv = ["hpcsgd", "topology", *{words!r}]
main()
"""
    for words, code_of_exit, text in [([], 0, "ring"), (["ring", "--png", "r.png"], 2, "[report]")]:
        done = run_alone(code.format(folder=str(tmp_path), words=words))
        assert done.returncode == code_of_exit and text in done.stdout + done.stderr, done
