"""The page as Chromium shows it: light, dark, wide and narrow, from pictures and from the DOM."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from hpcsgd.commands.report.html import page
from hpcsgd.commands.report.run_reader import load
from tests.support.sample_run_folders import usual, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.together,
    pytest.mark.timeout(120),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

WIDTHS = (1280, 400)
HEIGHT = 4000
# Chromium's window is never narrower than 500 pixels, but a frame in it is.
HARNESS = """<!DOCTYPE html><style>:root {{ color-scheme: light dark }} body {{ margin: 0; display: flex }}
iframe {{ border: 0; height: {height}px; flex: none }}</style>
{frames}
<script>
const box = ({{left, top, right, bottom}}) => ({{left, top, right, bottom}});
const of = element => box(element.getBoundingClientRect());
const measure = view => {{
  const all = selector => [...view.document.querySelectorAll(selector)];
  return {{
    width: view.innerWidth,
    needed: view.document.documentElement.scrollWidth,
    background: view.getComputedStyle(view.document.body).backgroundColor,
    legends: all(".legend, [id^=legend]").length,
    samples: all(".legend svg").map(of),
    entries: all(".legend li").map(of),
    grids: all(".figures").map(grid => [...grid.querySelectorAll("figure > svg")].map(of)),
    panels: all("figure > svg").map(svg => ({{
      svg: of(svg), axes: of(svg.querySelector("[id=patch_2]")),
      texts: [...svg.querySelectorAll("[id^=text_]")].map(of),
    }})),
  }};
}};
addEventListener("load", () => {{
  const result = document.createElement("pre");
  result.textContent = JSON.stringify(Array.from(frames, measure));
  document.body.append(result);
}});
</script>
"""


class Shown:
    """The page in frames of both widths, side by side, as measured and as a picture, by one Chromium."""

    def __init__(self, text: str, folder: Path, *, dark: bool) -> None:
        harness, self._picture = folder / "frames.html", folder / "picture.png"
        frames = "".join(f'<iframe width="{width}" srcdoc="{escape(text)}"></iframe>' for width in WIDTHS)
        harness.write_text(HARNESS.format(height=HEIGHT, frames=frames), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += [f"--user-data-dir={folder / 'profile'}", f"--screenshot={self._picture}", "--dump-dom"]
        options += [f"--window-size={sum(WIDTHS)},{HEIGHT}"]
        options += ["--blink-settings=preferredColorScheme=0"] * dark  # 0: dark
        assert CHROMIUM
        command = [CHROMIUM, *options, harness.as_uri()]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
        )

    def read(self) -> Shown:
        """Wait for the measurements and the picture."""
        try:
            dom, _ = self._process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        result = dom[dom.rindex("<pre>") + len("<pre>") : dom.rindex("</pre>")]
        self.frames: list[dict[str, Any]] = json.loads(unescape(result))
        self.pixels = imread(self._picture)[..., :3]
        return self

    def cut(self, frame: int, box: dict[str, float]) -> np.ndarray:
        """The pixels of a box in a frame."""
        left = sum(WIDTHS[:frame])
        top, bottom = round(box["top"]), round(box["bottom"])
        return self.pixels[top:bottom, left + round(box["left"]) : left + round(box["right"])]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    strategies = [
        "lasgd",
        "local:period=8",
        "allreduce",
        "dsgd:topology=ring",
        "sgp",
        "adpsgd",
        "ps:servers=1",
    ]
    digits = [write_run(folder / each, usual(2), strategy=each) for each in strategies]
    stopped = write_run(folder / "stopped", usual(2), done=False, compress="ef+powersgd")
    never = [row for row in usual(2) if row["event"] == "train"]
    digits += [stopped, write_run(folder / "never", never, done=False, compress="ef+maxnorm:bits=4")]
    small = usual(3, loss=1.23456e-5, bytes_sent=[0] * 3)
    words = [
        write_run(folder / "text" / each, small, strategy=each, data="text", model="gpt")
        for each in ("allreduce", "backup:backups=dynamic,topology=exponential")
    ]
    return page([load(each) for each in (*digits, *words)])


@pytest.fixture(scope="module")
def schemes(text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shown]:
    started = {
        name: Shown(text, tmp_path_factory.mktemp(name), dark=name == "dark") for name in ("light", "dark")
    }
    return {name: shown.read() for name, shown in started.items()}


@pytest.fixture
def light(schemes: dict[str, Shown]) -> Shown:
    return schemes["light"]


def luminance(pixels: np.ndarray) -> np.ndarray:
    """Relative luminance of sRGB pixels, as WCAG defines it."""
    linear = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def overlapping(boxes: list[dict[str, float]]) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """Pairs of boxes that share more than the rounding of a pixel."""
    for index, a in enumerate(boxes):
        for b in boxes[index + 1 :]:
            width = min(a["right"], b["right"]) - max(a["left"], b["left"])
            height = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
            if min(width, height) > 1:
                yield a, b


@pytest.mark.parametrize("frame", [0, 1])
def test_nothing_is_wider_than_the_window(light: Shown, frame: int) -> None:
    shown = light.frames[frame]
    assert shown["width"] == WIDTHS[frame]
    assert shown["needed"] <= shown["width"]


@pytest.mark.parametrize("frame", [0, 1])
def test_one_legend_whose_entries_are_apart(light: Shown, frame: int) -> None:
    shown = light.frames[frame]
    assert shown["legends"] == 1
    assert len(shown["entries"]) == 10  # one of all-reduce, for both tasks
    assert not [*overlapping(shown["entries"])]


@pytest.mark.parametrize("frame", [0, 1])
def test_panels_line_up(light: Shown, frame: int) -> None:
    shown = light.frames[frame]
    columns = (3, 1)[frame]
    assert len(shown["grids"]) == 2 * 4
    lefts = {round(panel["left"]) for grid in shown["grids"] for panel in grid}
    assert len(lefts) == columns
    for grid in shown["grids"]:
        assert [round(panel["left"]) for panel in grid] == (sorted(lefts) * len(grid))[: len(grid)]
        for start in range(0, len(grid), columns):
            assert len({round(panel["bottom"]) for panel in grid[start : start + columns]}) == 1
    insets = [
        [panel["axes"][side] - panel["svg"][side] for side in ("left", "top", "right", "bottom")]
        for panel in shown["panels"]
    ]
    assert np.ptp(insets, axis=0).max() < 1


@pytest.mark.parametrize("frame", [0, 1])
def test_texts_of_panels_are_neither_cut_nor_on_each_other(light: Shown, frame: int) -> None:
    for panel in light.frames[frame]["panels"]:
        svg = panel["svg"]
        assert len(panel["texts"]) > 6
        for text in panel["texts"]:
            assert text["left"] >= svg["left"] - 1 and text["right"] <= svg["right"] + 1
            assert text["top"] >= svg["top"] - 1 and text["bottom"] <= svg["bottom"] + 1
        assert not [*overlapping(panel["texts"])]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_and_lines_have_contrast(schemes: dict[str, Shown], scheme: str) -> None:
    shown = schemes[scheme]
    background = luminance(shown.pixels[2, 2])
    assert background < 0.05 if scheme == "dark" else background > 0.95
    for index, frame in enumerate(shown.frames):
        assert luminance(shown.pixels[-3, sum(WIDTHS[: index + 1]) - 3]) == pytest.approx(background)
        lines = [luminance(shown.cut(index, box)) for box in frame["samples"]]
        assert len(lines) == 10
        for line in lines:
            farthest = line.flat[np.abs(line - background).argmax()]
            dim, bright = sorted([farthest, background])
            assert (bright + 0.05) / (dim + 0.05) > 2
    # A panel has ink, and is not a white sheet on a dark page.
    panel = luminance(shown.cut(0, shown.frames[0]["panels"][0]["svg"]))
    assert np.median(panel) == pytest.approx(background, abs=0.01)
    assert np.ptp(panel) > 0.7
