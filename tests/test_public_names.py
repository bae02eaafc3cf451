"""The public names of hpcsgd: one table, which type checkers see as imports."""

from __future__ import annotations

import ast
from pathlib import Path

import hpcsgd


def test_imports_for_type_checkers_are_those_of_the_table() -> None:
    tree = ast.parse(Path(hpcsgd.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names:
            assert alias.asname == alias.name, "only `import X as X` is exported"
            found[alias.name] = node.module
    assert found == hpcsgd._MODULE_OF


def test_every_public_name_is_there_and_documented() -> None:
    for name in hpcsgd.__all__:
        assert getattr(hpcsgd, name).__doc__, name
    assert dir(hpcsgd) == hpcsgd.__all__
