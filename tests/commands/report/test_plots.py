"""Figures: every curve holds its run's numbers, and nothing else is drawn."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from hpcsgd.commands.report.figures import DASHES, INK, PALETTE, draw_alone, line_styles
from hpcsgd.commands.report.plots import figures, sections
from hpcsgd.commands.report.run_reader import load
from tests.support.sample_run_folders import test as tested
from tests.support.sample_run_folders import train, usual, write_run


def test_curves_hold_the_records(tmp_path: Path) -> None:
    runs = [load(write_run(tmp_path / str(n), usual(ranks=n))) for n in (1, 4)]
    accuracy, loss, training, ranks = figures(runs)
    names = [figure.get_label() for figure in (accuracy, loss, training, ranks)]
    assert names == ["accuracy", "loss", "training-loss", "ranks"]
    for figure, columns, values in (
        (accuracy, lambda r: r.test, lambda c: 100 * c.accuracy),
        (loss, lambda r: r.test, lambda c: c.loss),
        (training, lambda r: r.train, lambda c: c.loss),
    ):
        for panel, x in zip(
            figure.axes,
            (lambda c: c.time, lambda c: c.epoch, lambda c: c.bytes_sent.mean(axis=1) / 1000),
            strict=True,
        ):
            lines = [line for line in panel.lines if len(line.get_xdata()) > 1]
            for line, run in zip(lines, runs, strict=True):
                assert np.allclose(line.get_xdata(), x(columns(run)))
                assert np.allclose(line.get_ydata(), values(columns(run)))


def test_runs_of_other_tasks_have_figures_of_their_own(tmp_path: Path) -> None:
    digits = [load(write_run(tmp_path / each, strategy=each)) for each in ("lasgd", "allreduce")]
    text = load(write_run(tmp_path / "text", data="text", model="gpt:layers=2"))
    parts = sections([digits[0], text, digits[1]])
    assert [[line.run for line in part.lines] for part in parts] == [digits[::-1], [text]]
    assert [part.title for part in parts] == ["digits · mlp", "text · GPT"]
    drawn = figures([*digits, text])
    names = [figure.get_label() for figure in drawn]
    assert names[0] == "accuracy-1-digits-mlp" and names[-1] == "ranks-2-text-gpt"
    counts = [sum(len(line.get_xdata()) > 1 for line in figure.axes[0].lines) for figure in drawn]
    assert counts == [2, 2, 2, 0, 1, 1, 1, 0]


def test_the_baseline_has_one_colour_and_is_drawn_first(tmp_path: Path) -> None:
    strategies = ("lasgd", "local:period=8", "allreduce", "dsgd")
    runs = [load(write_run(tmp_path / each, strategy=each)) for each in strategies]
    runs.append(load(write_run(tmp_path / "text", data="text")))
    runs.append(load(write_run(tmp_path / "coded", data="text", compress="fp16")))
    digits, text = sections(runs)
    for part in (digits, text):
        assert [line.color == INK for line in part.lines] == [True, *[False] * (len(part.lines) - 1)]
        assert part.lines[0].run.config["strategy"] == "allreduce"
    assert [line.label for line in text.lines] == ["all-reduce", "all-reduce, FP16"]


def test_styles_tell_many_runs_apart() -> None:
    labels = [str(number) for number in range(len(DASHES) * (len(PALETTE) - 1))]
    assert len(set(line_styles(labels, {"3"}).values())) == len(labels)
    assert len(set(line_styles(labels, set(labels)).values())) == len(labels)
    assert [color for color, _ in line_styles(labels, {"3", "7"}).values()].count(INK) == 2


@pytest.mark.filterwarnings("error")
def test_many_records_of_training_are_averaged_and_no_evaluation(tmp_path: Path) -> None:
    rows = [train(step, loss=float(step % 5)) for step in range(1, 601)]
    rows[0] |= {"loss": math.inf}
    rows[1] |= {"loss": -math.inf}
    run = load(write_run(tmp_path / "run", [*rows, *(tested(step) for step in range(600, 700))]))
    accuracy, _, training, _ = figures([run])
    line = training.axes[1].lines[0]
    assert np.isnan(line.get_ydata()[0]) and np.allclose(line.get_ydata()[1:], 2.0)
    assert len(line.get_ydata()) == 60 and line.get_xdata()[-1] == pytest.approx(600 / 32)
    assert np.allclose(accuracy.axes[1].lines[0].get_ydata(), 100 * run.test.accuracy)


def test_axes_name_quantity_and_unit(tmp_path: Path) -> None:
    accuracy, loss, *_ = figures([load(write_run(tmp_path / "run"))])
    assert [axes.get_xlabel() for axes in accuracy.axes] == [
        "wall-clock time (s)",
        "epochs",
        "bytes sent per rank (kB)",
    ]
    assert accuracy.axes[0].get_ylabel() == "test accuracy (%)"
    assert loss.axes[0].get_ylabel() == "test loss"


def test_axis_names_traffic_through_shared_memory(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run", usual(bytes_sent=[0] * 4)))
    panel = figures([run])[0].axes[2]
    assert "shared memory" in panel.get_xlabel()
    assert np.allclose(panel.lines[0].get_xdata(), run.test.bytes_shared.mean(axis=1))


def test_a_run_that_sends_none_is_not_drawn_among_those_that_do(tmp_path: Path) -> None:
    silent = load(write_run(tmp_path / "silent", usual(bytes_sent=[0] * 4)))
    panel = figures([silent, load(write_run(tmp_path / "run"))])[0].axes[2]
    assert np.isnan(panel.lines[0].get_xdata()).all()
    assert "not drawn" in panel.get_xlabel()


def test_no_bytes_at_all_need_no_panel(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run", usual(ranks=1, bytes_sent=[0], bytes_shared=[0])))
    assert len(figures([run])[0].axes) == 2


def test_bars_are_mean_seconds_per_step(tmp_path: Path) -> None:
    (panel,) = figures([load(write_run(tmp_path / "run"))])[3].axes
    heights = [bar.get_height() for bar in panel.patches]
    assert heights == pytest.approx([1, 2, 3, 4, 3, 2, 1, 0])
    assert "(ms)" in panel.get_ylabel()


def test_runs_drawn_alone_keep_a_common_scale(tmp_path: Path) -> None:
    runs = [load(write_run(tmp_path / str(n), usual(ranks=n))) for n in (2, 8)]
    (part,) = sections(runs)
    assert part.ranks
    first, second = [draw_alone(panel).axes[0] for panel in part.ranks.panels]
    assert first.get_position().bounds == second.get_position().bounds
    assert first.get_ylim() == second.get_ylim() and first.get_ylim()[1] > 8


def test_last_values_are_written_apart(tmp_path: Path) -> None:
    ends = [0.9, 0.9, 0.9001, 0.5]
    runs = [
        load(write_run(tmp_path / str(i), [tested(1, accuracy=0.1), tested(2, accuracy=end)]))
        for i, end in enumerate(ends)
    ]
    texts = figures(runs)[0].axes[-1].texts
    assert sorted(text.get_text() for text in texts) == ["50.00", "90.00", "90.00", "90.01"]
    heights = sorted(text.get_position()[1] for text in texts)
    assert min(np.diff(heights)) > 0.08 and heights[-1] <= 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_leave_gaps(tmp_path: Path, bad: float) -> None:
    rows = [tested(1), tested(2, loss=bad), tested(3), tested(4, loss=bad, accuracy=math.nan)]
    lost = load(write_run(tmp_path / "lost", [tested(1, loss=bad, accuracy=bad)]))
    run = load(write_run(tmp_path / "run", rows))
    _, loss = figures([run, lost])
    drawn = loss.axes[0].lines[0].get_ydata()
    assert np.isfinite(drawn).tolist() == [True, False, True, False]
    assert loss.axes[-1].texts[0].get_text() == f"{bad}"


@pytest.mark.filterwarnings("error")
def test_losses_decades_apart_get_a_logarithmic_axis(tmp_path: Path) -> None:
    far = load(write_run(tmp_path / "far", [tested(1, loss=1e9), tested(2, loss=0.1)]))
    near = load(write_run(tmp_path / "near", [tested(1, loss=2.0), tested(2, loss=0.5)]))
    zero = load(write_run(tmp_path / "zero", [tested(1, loss=1e9), tested(2, loss=0.0)]))
    scales = [figures([run])[1].axes[0].get_yscale() for run in (far, near, zero)]
    assert scales == ["log", "linear", "linear"]


@pytest.mark.filterwarnings("error")
def test_a_run_without_evaluations_is_drawn_as_far_as_it_goes(tmp_path: Path) -> None:
    training, ranks = figures([load(write_run(tmp_path / "run", [train(0)]))])
    assert training.get_label() == "training-loss" and len(ranks.axes[0].patches) == 8
