"""The Markdown pages: links and names in them exist, and README.md is short."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.markdown_pages import ROOT, Page, pages
from tests.test_floors import FLOORS

PAGES = pages()
README = next(page for page in PAGES if page.name == "README.md")
CHANGELOG = "CHANGELOG.md"

#: Documented names that no source of this repository contains.
FOREIGN = {
    "my_comm",
    "LD_LIBRARY_PATH",
    "MPICC",
    "async_model_average",
    "NBC_Progress",
    "MPI_Comm_shrink",
    "MPIR_CVAR_CH4_NETMOD",
}
SOURCES = {".py", ".cu", ".h", ".sh", ".sbatch"}


def by_name(page: Page) -> str:
    return page.name


def broken_links(page: Page) -> list[str]:
    """Links of a page whose file or heading does not exist."""
    broken = []
    for link in page.links:
        file, anchor = page.resolve(link)
        anchors = Page(file).anchors if file.suffix == ".md" and file.is_file() else set()
        if not file.exists() or (anchor and anchor not in anchors):
            broken.append(link)
    return broken


def current_spans(page: Page) -> list[str]:
    """Code spans of a page, but of the changelog only the last column of its tables, which has new names."""
    if page.name != CHANGELOG:
        return page.spans
    rows = [line.rstrip().removesuffix("|") for line in page.text.splitlines() if line.startswith("|")]
    return Page(page.path, "\n".join(row.rpartition("|")[2] for row in rows)).spans


def missing_paths(page: Page) -> list[str]:
    """Paths in code spans that exist neither in the repository nor in the page's folder."""
    missing = []
    for span in current_spans(page):
        if re.fullmatch(r"(jobs|tests|hpcsgd|kernels|\.ci)/[\w./*-]*", span):
            found = any(ROOT.glob(span)) if "*" in span else (ROOT / span).exists()
        elif re.fullmatch(r"\w+\.(py|cu|h|sh|sbatch)", span) and span != "train.py":
            found = any(page.path.parent.rglob(span)) or page.name == CHANGELOG
        else:
            continue
        if not found and span not in page.sample_files:
            missing.append(span)
    return missing


def unresolved(page: Page) -> list[str]:
    """Dotted names in code spans and blocks that Python cannot resolve."""
    code = [
        *current_spans(page),
        *(block.text for block in page.blocks if block.language in ("python", "diff")),
    ]
    names = {name for text in code for name in re.findall(r"\bhpcsgd(?:\.[A-Za-z_]\w*)+", text)}
    samples = {file.removesuffix(".py").replace("/", ".") for file in page.sample_files}
    return [name for name in sorted(names - samples) if not resolves(name)]


@cache
def resolves(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part, None)
        return value is not None
    return False


@cache
def words_of_the_sources() -> set[str]:
    folders = [ROOT / name for name in ("hpcsgd", "kernels", "jobs", "tests")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in SOURCES]
    files = [path for path in files if path.parent != Path(__file__).parent] + [ROOT / "setup.cfg"]
    return {word for path in files for word in re.findall(r"\w+", path.read_text())}


def unknown_identifiers(page: Page) -> list[str]:
    """Identifiers in code spans, with a capital letter or an underscore, that no source contains."""
    names = set()
    for span in current_spans(page):
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\)|=.*)?", span):
            names |= {name for name in re.findall(r"[A-Za-z_]\w{3,}", span) if re.search(r"[A-Z_]", name)}
    names |= set(re.findall(r"HPCSGD_[A-Z_]*[A-Z]", page.text))
    samples = {word for block in page.blocks for word in re.findall(r"\w+", block.text)}
    return sorted(names - words_of_the_sources() - samples - FOREIGN)


def reachable(pages: list[Page]) -> set[Path]:
    """Files of the pages that links lead to from README.md."""
    by_path = {page.path: page for page in pages}
    found, new = set(), [ROOT / "README.md"]
    while new:
        path = new.pop()
        if path in by_path and path not in found:
            found.add(path)
            new += [by_path[path].resolve(link)[0] for link in by_path[path].links]
    return found


def too_wide(page: Page, columns: int = 120) -> list[str]:
    """Lines wider than so many columns outside tables and code, where targets of links do not count."""
    lines = re.sub(r"\]\([^)]*\)", "]", page.prose).splitlines()
    return [line for line in lines if len(line) > columns and not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_exist(page: Page) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_paths_exist(page: Page) -> None:
    assert missing_paths(page) == []


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if re.search(r"^\|.*\| file \||^\| file \|", page.text, re.MULTILINE)],
    ids=by_name,
)
def test_tables_of_files_are_complete(page: Page) -> None:
    files = {path.name for path in page.path.parent.glob("*.py") if not path.name.startswith("_")}
    assert {file for file in files if file not in page.text} == set()


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_names_exist(page: Page) -> None:
    assert unresolved(page) == []
    assert unknown_identifiers(page) == []


def test_every_page_is_reachable_from_the_readme() -> None:
    assert {page.path for page in PAGES} - reachable(PAGES) == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (README,)], ids=by_name)
def test_every_page_links_back_to_the_readme(page: Page) -> None:
    assert README.path in {page.resolve(link)[0] for link in page.links}


def test_the_readme_lists_the_architecture_from_below() -> None:
    table = README.text.partition("## Architecture")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| \[?`([\w.]+)`", table, re.MULTILINE)
    assert [row.removesuffix(".py") for row in rows] == FLOORS


def test_the_readme_is_short() -> None:
    assert len(README.text.splitlines()) <= 200
    assert len(README.text.encode()) <= 16 * 1024
    assert too_wide(README) == []


def page_of(text: str) -> Page:
    """A page in the repository's root."""
    return Page(ROOT / "SAMPLE.md", text)


def test_anchors_follow_github() -> None:
    page = page_of(
        "# A\n## All-reduce, 4 hosts at 1 Gbit/s\n## `x_y` and [z](u)\n```\n# no heading\n```\n# A\n"
    )
    assert page.anchors == {"a", "all-reduce-4-hosts-at-1-gbits", "x_y-and-z", "a-1"}


def test_a_broken_link_is_found() -> None:
    page = page_of(
        "[a](README.md#train) [b](README.md#nowhere) ![c](no.png) [`d`](no.md) [e](https://x.org)\n"
    )
    assert broken_links(page) == ["README.md#nowhere", "no.png", "no.md"]


def test_missing_names_are_found() -> None:
    page = page_of(
        "`jobs/no.sh` `jobs/ps.sh` `no.py` `hpcsgd.no` `hpcsgd.Run` `NoSuch` `no_such(1)` HPCSGD_NO\n"
    )
    assert missing_paths(page) == ["jobs/no.sh", "no.py"]
    assert unresolved(page) == ["hpcsgd.no"]
    assert unknown_identifiers(page) == ["HPCSGD_NO", "NoSuch", "no_such"]


def test_an_unreachable_page_and_a_wide_line_are_found() -> None:
    page = page_of("x " * 61 + "\n| " + "x " * 61 + "\n```text\n" + "x " * 61 + "\n```\n")
    assert page.path not in reachable([*PAGES, page])
    assert len(too_wide(page)) == 1
