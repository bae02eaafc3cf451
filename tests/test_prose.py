"""Rules of names and prose that a machine can hold: nothing speaks, and the thing is the subject."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted({*(ROOT / "hpcsgd").rglob("*.py"), *(ROOT / "hpcsgd" / "kernels").rglob("*.py")})
#: Messages are sent and received, records written, values equal: none of them is spoken.
SPEECH = {
    "tell",
    "tells",
    "told",
    "telling",
    "say",
    "says",
    "said",
    "saying",
    "hear",
    "hears",
    "heard",
    "hearing",
}
_SPOKEN = re.compile(rf"\b({'|'.join(sorted(SPEECH))})\b", re.IGNORECASE)
_FRAGMENT = re.compile(r"(What|Who|Of)\b")
_LONGEST = 400


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def prose(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the comments, and of the strings that hold more than a word."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that a file names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


def words(identifier: str) -> set[str]:
    """The words of a snake_case or CamelCase name."""
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower().split("_"))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_docstrings_begin_with_the_thing(path: Path) -> None:
    found = [
        f"{n}: {text[:60]}" for n, text in docstrings(ast.parse(path.read_text())) if _FRAGMENT.match(text)
    ]
    assert not found


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_speaks_or_listens(path: Path) -> None:
    text = path.read_text()
    found = [f"{n}: {part[:80]}" for n, part in prose(text) if _SPOKEN.search(part)]
    found += [f"{n}: {name}" for n, name in identifiers(ast.parse(text)) if words(name) & SPEECH]
    assert not found


def test_rules_find_what_they_forbid() -> None:
    bad = 'def told(hear):\n    "Of a rank."\n    x = "the rank says so"  # as it was told\n'
    tree = ast.parse(bad)
    assert [text for _, text in docstrings(tree) if _FRAGMENT.match(text)] == ["Of a rank."]
    assert len([part for _, part in prose(bad) if _SPOKEN.search(part)]) == 2
    assert [name for _, name in identifiers(tree) if words(name) & SPEECH] == ["told", "hear"]


def test_no_file_is_too_long() -> None:
    everything = [*FILES, *(ROOT / "tests").rglob("*.py")]
    found = {relative(path): len(path.read_text().splitlines()) for path in everything}
    assert not {name: lines for name, lines in found.items() if lines > _LONGEST}


def test_a_class_name_means_one_thing() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(relative(path))
    assert not {name: files for name, files in homes.items() if len(files) > 1}


def test_objects_are_made_by_their_constructors() -> None:
    for path in FILES:
        if path.name != "fingerprint.py":  # copies data sets of the user's own
            assert not re.search(r"copy\.copy\(|object\.__new__\(", path.read_text()), relative(path)
