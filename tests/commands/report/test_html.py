"""The HTML page: self-contained, well-formed, and escaped for any name of a run."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hpcsgd.commands.report.html import page
from hpcsgd.commands.report.records import RunRecord
from hpcsgd.commands.report.run_reader import load
from hpcsgd.commands.report.summary import cells
from tests.support.sample_run_folders import test as tested
from tests.support.sample_run_folders import usual, write_run

EVIL = "<script>alert('x')</script> & --> $x_1$ \"q\""


class Reader(HTMLParser):
    """Collects tags, attributes and cells, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    folder = tmp_path_factory.mktemp("runs")
    lost = [tested(1, ranks=2), tested(2, ranks=2, loss=math.nan, accuracy=math.inf)]
    return [
        load(write_run(folder / "a", strategy=EVIL[:40], note=EVIL, end='\n{"cut')),
        load(write_run(folder / "b", usual(ranks=2) + lost[2:], batch=64)),
        load(write_run(folder / "c", lost, model="</pre><img src=http://x.y/z>")),
    ]


@pytest.fixture(scope="module")
def text(runs: list[RunRecord]) -> str:
    return page(runs)


def test_page_is_self_contained(text: str) -> None:
    reader = Reader(text)
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
            assert value.startswith(("#", "data:"))
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(reader.tags)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))
    curves, ranks, samples = 3 * 3 + 2 * 3, 2, 3
    assert reader.tags.count("svg") == curves + ranks + samples


def test_every_reference_within_the_page_has_a_target(text: str) -> None:
    attributes = Reader(text).attributes
    targets = {value for name, value in attributes if name == "id"}
    used = {value[1:] for name, value in attributes if name == "href"}
    used |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert used and used <= targets


def test_settings_and_labels_are_text(text: str, runs: list[RunRecord]) -> None:
    reader = Reader(text)
    assert "<script" not in text and "<img" not in text
    assert reader.text["pre"] == [run.config_text for run in runs]


def test_the_table_on_the_page_is_the_summary(text: str, runs: list[RunRecord]) -> None:
    header, rows = cells(runs)
    reader = Reader(text)
    numbers = [cell for row in rows for cell in row[1:]]
    assert reader.text["td"][: len(numbers)] == numbers
    assert reader.text["th"][: len(header)] == header


def test_notes_are_on_the_page(text: str) -> None:
    notes = "".join(Reader(text).text["li"])
    assert "cut short" in notes and "not finite in 1 of 2" in notes


def test_text_in_figures_follows_the_page_in_the_dark(text: str) -> None:
    assert "prefers-color-scheme: dark" in text and "currentColor" in text
    figures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "#1a1a1b" not in figures and "#ffffff" not in figures


def test_a_single_run_has_no_comparison(tmp_path: Path) -> None:
    text = page([load(write_run(tmp_path / EVIL.replace("/", "_")))])
    assert "Settings that differ" not in text and "<script" not in text
    assert Reader(text).tags.count("h1") == 1
