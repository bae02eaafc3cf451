"""A module imports only from floors below its own; mpi4py and numba each have one floor."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hpcsgd"
#: From the ground up. Modules of one floor may import each other.
FLOORS = [
    {"errors", "specs", "topology", "kernels"},
    {"diagnostics", "mpi"},
    {"tensors", "compress"},
    {"collectives"},
    {"strategies", "server"},
    {"training", "metrics", "settings", "optim", "display", "board", "memory", "journal", "signals", "folder"}
    | {"sweep"},
    {"cli", "sbatch", "train", "survival", "serve", "service", "tune", "bench", "report", "doctor"}
    | {"__main__"},
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")})
#: The benchmark measures MPI itself beside ours; the doctor looks at an MPI on which no World opens.
MAY_USE_MPI = FLOORS[1] | {"bench", "doctor"}


def name_of(path: Path) -> str:
    """The module or package below hpcsgd that the file belongs to; "" for hpcsgd itself."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Each module that a file imports, and whether the import runs when the file is imported."""
    yield from _imports(ast.parse(path.read_text()), path, True)


def _imports(node: ast.AST, path: Path, at_once: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from _imports(other, path, at_once)
        elif isinstance(child, ast.Import):
            yield from ((alias.name, at_once) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = ".".join(filter(None, ["hpcsgd" * bool(child.level), child.module or ""]))
            if module == "hpcsgd":
                yield from ((f"hpcsgd.{alias.name}", at_once) for alias in child.names)
            else:
                yield module, at_once
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, path, at_once and not inside)


def show(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_there_are_modules_and_each_has_a_floor() -> None:
    assert len(MODULES) > 20
    assert {name_of(path) for path in MODULES} - {""} <= set(FLOOR_OF)


@pytest.mark.parametrize("path", MODULES, ids=show)
def test_imports_come_from_the_same_floor_or_below(path: Path) -> None:
    mine = name_of(path)
    used = {m.split(".")[1] for m, _ in imports(path) if m.startswith("hpcsgd.")} - {mine}
    if mine:
        above = {name for name in used & set(FLOOR_OF) if FLOOR_OF[name] > FLOOR_OF[mine]}
        assert not above, f"{mine} stands below {above}"
        assert used <= set(FLOOR_OF), f"from hpcsgd itself, the roof: {used - set(FLOOR_OF)}"


@pytest.mark.parametrize("path", MODULES, ids=show)
def test_mpi4py_is_imported_on_the_floor_of_the_world_and_only_when_used(path: Path) -> None:
    found = [at_once for module, at_once in imports(path) if module.split(".")[0] == "mpi4py"]
    assert not found or name_of(path) in MAY_USE_MPI
    assert not any(found), "the import of mpi4py.MPI initialises MPI"


@pytest.mark.parametrize("path", MODULES, ids=show)
def test_numba_is_imported_by_kernels_and_kernels_only_when_used(path: Path) -> None:
    if name_of(path) == "kernels":
        return
    for module, at_once in imports(path):
        assert module.split(".")[0] not in ("numba", "llvmlite")
        assert not (at_once and module.startswith("hpcsgd.kernels")), "that imports numba"
