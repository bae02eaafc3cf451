"""The list of public names in hpcsgd/README.md is made of their docstrings: python -m tests.docs.test_api."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import hpcsgd
from tests.support.markdown_pages import ROOT

PAGE = ROOT / "hpcsgd" / "README.md"
BEGIN, END = "<!-- public names -->\n", "<!-- end of the public names -->\n"
TITLES = {
    "training": "The run",
    "strategies": "Strategies",
    "compress": "Compression",
    "mpi": "Ranks",
    "tensors": "Tensors",
    "errors": "Errors",
}
#: The class whose methods every user calls.
WITH_METHODS = "Run"


def listed() -> str:
    """Return the tables."""
    return "\n".join(table(title, package) for package, title in TITLES.items())


def table(title: str, package: str) -> str:
    rows = [row for name in hpcsgd.__all__ if package_of(name) == package for row in rows_of(name)]
    return "\n".join([f"| {title} | |", "|---|---|", *rows, ""])


def package_of(name: str) -> str:
    return str(hpcsgd._MODULE_OF[name].split(".")[1])


def rows_of(name: str) -> Iterator[str]:
    kind = getattr(hpcsgd, name)
    yield f"| `{name}` | {sentence(kind)} |"
    own = [base for base in kind.__mro__ if base.__module__.startswith("hpcsgd.")]
    for method, value in (
        [item for base in own for item in vars(base).items()] if name == WITH_METHODS else ()
    ):
        if not method.startswith("_"):
            yield f"| `.{method}{'' if isinstance(value, property) else '()'}` | {sentence(value)} |"


def sentence(documented: object) -> str:
    """Return the first sentence of a docstring, in one line of a table."""
    text = inspect.getdoc(documented)
    assert text, documented
    first = re.split(r"(?<=[a-z0-9)`*])\.(?:\s|$)", text.partition("\n\n")[0], maxsplit=1)[0]
    return " ".join(first.rstrip(".").replace("|", "\\|").split())


def test_the_page_lists_all_public_names_with_their_docstrings() -> None:
    assert set(TITLES) == set(map(package_of, hpcsgd.__all__))
    found = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert found.strip() == listed().strip(), "python -m tests.docs.test_api writes the list anew"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{listed()}\n{END}{rest.partition(END)[2]}")
