"""Each row of a registry is exported, and documented on the page of its folder."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import hpcsgd
from hpcsgd import collectives, compress, strategies, topology
from hpcsgd.strategies.delays import DELAYS
from hpcsgd.training.data import DATASETS
from hpcsgd.training.models import MODELS
from tests.support.markdown_pages import ROOT, Page

#: For each registry: the page that documents its rows; and the packages that export them.
REGISTRIES: dict[str, tuple[dict[str, Any], str, tuple[Any, ...]]] = {
    "strategies": (strategies.STRATEGIES, "hpcsgd/strategies", (hpcsgd,)),
    "delays": (DELAYS, "hpcsgd/strategies", ()),
    "compressors": (compress.COMPRESSORS, "hpcsgd/compress", (hpcsgd,)),
    "wrappers": (compress.WRAPPERS, "hpcsgd/compress", (hpcsgd,)),
    "topologies": (topology.TOPOLOGIES, "hpcsgd/topology", (topology,)),
    "data sets": (DATASETS, "hpcsgd/training", ()),
    "models": (MODELS, "hpcsgd/training", ()),
    "all-reduce algorithms": (collectives.ALGORITHMS, "hpcsgd", ()),
}
#: Parameters of rows that are no options.
SET_ELSEWHERE: dict[str, set[str]] = {
    "strategies": set(),
    "delays": set(),
    "compressors": set(),
    "topologies": {"size"},
    "data sets": set(),
    "models": {"shape", "classes"},
}
ROWS = [(registry, name) for registry, (rows, _, _) in REGISTRIES.items() for name in rows]


def documents(page: Page, name: str) -> bool:
    """Whether a page has a name in code: alone, with options, or before what it wraps."""
    return any(re.match(rf"{re.escape(name)}(?![\w-])", span) for span in page.spans)


def tables(page: Page) -> Iterator[str]:
    """The lines of a page's tables."""
    return (line for line in page.prose.splitlines() if line.lstrip().startswith("|"))


@pytest.mark.parametrize(("registry", "name"), ROWS)
def test_a_row_is_documented_on_its_page(registry: str, name: str) -> None:
    _, folder, _ = REGISTRIES[registry]
    page = Page(ROOT / folder / "README.md")
    assert documents(page, name)
    assert any(documents(Page(page.path, line), name) for line in tables(page))


@pytest.mark.parametrize(
    ("registry", "name"), [(registry, name) for registry, name in ROWS if REGISTRIES[registry][2]]
)
def test_a_row_is_exported(registry: str, name: str) -> None:
    rows, _, packages = REGISTRIES[registry]
    for package in packages:
        assert rows[name].__name__ in package.__all__
        assert getattr(package, rows[name].__name__) is rows[name]


@pytest.mark.parametrize(
    ("registry", "name"), [(registry, name) for registry, name in ROWS if registry in SET_ELSEWHERE]
)
def test_the_options_of_a_row_are_on_its_page(registry: str, name: str) -> None:
    rows, folder, _ = REGISTRIES[registry]
    text = (ROOT / ("hpcsgd/server" if name == "ps" else folder) / "README.md").read_text()
    options = set(inspect.signature(rows[name]).parameters) - SET_ELSEWHERE[registry]
    missing = [option for option in sorted(options) if not re.search(rf"[`,:+(]{option}[`=]", text)]
    assert not missing


@pytest.mark.parametrize("registry", ["strategies", "compressors", "wrappers"])
def test_the_readme_has_every_method_and_scheme(registry: str) -> None:
    readme = Page(ROOT / "README.md")
    for name in REGISTRIES[registry][0]:
        assert documents(readme, name), name


def test_a_name_that_is_not_on_a_page_is_found_missing() -> None:
    page = Page(ROOT / "README.md", "`ef+maxnorm`, `randk-maxnorm:bits=4` and `ring`s; psgd")
    assert all(documents(page, name) for name in ("ef", "randk-maxnorm", "ring"))
    assert not any(documents(page, name) for name in ("maxnorm", "randk", "psgd", "ps"))
