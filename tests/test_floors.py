"""The architecture is the list of folders below: a folder imports only from those before it, and nothing in
circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hpcsgd"
#: A folder, or module, imports only from those before it.
FLOORS = ["errors", "registry", "kernels", "diagnostics", "topology", "compress", "mpi"]
FLOORS += ["tensors", "collectives", "server", "strategies", "training", "commands"]
#: Where mpi4py may be imported: benchmarks measure MPI itself; the doctor examines an MPI on which no World
#: opens.
MAY_USE_MPI = ["mpi", "commands/bench", "commands/doctor"]

FILES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")})


def module_of(path: Path) -> str:
    """The dotted name of a file's module."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def folder_of(module: str) -> str:
    """The folder or module directly below hpcsgd; "" for hpcsgd itself."""
    return [*module.split("."), ""][1]


@cache
def imports(module: str) -> list[tuple[str, bool]]:
    """Each module that a module imports, and whether the import runs when the module is imported."""
    return list(_imports(ast.parse(MODULES[module].read_text()), True))


def _imports(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from _imports(other, at_import)
        elif isinstance(child, ast.Import):
            yield from ((alias.name, at_import) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module is not None and not child.level, "relative imports hide the architecture"
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield inner if inner in MODULES else child.module, at_import
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, at_import and not inside)


def test_floors_are_what_ls_shows() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    entries = folders | {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert entries == set(FLOORS)
    assert len(FLOORS) <= 13


@pytest.mark.parametrize("floor", FLOORS)
def test_folder_imports_only_from_those_before_it(floor: str) -> None:
    above = {"", *FLOORS[FLOORS.index(floor) + 1 :]}
    wrong = [
        f"{module} imports {used}"
        for module in MODULES
        for used, _ in imports(module)
        if folder_of(module) == floor and used.split(".")[0] == "hpcsgd" and folder_of(used) in above
    ]
    assert not wrong


def test_no_circle_inside_a_folder() -> None:
    graph = {m: {used for used, _ in imports(m) if used in MODULES and used != m} for m in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_mpi4py_is_imported_where_it_may_be_and_only_when_used() -> None:
    for module, path in MODULES.items():
        found = [at_import for used, at_import in imports(module) if used.split(".")[0] == "mpi4py"]
        relative = path.relative_to(PACKAGE).as_posix()
        assert not found or relative.startswith(tuple(f"{folder}/" for folder in MAY_USE_MPI)), module
        assert not any(found), f"{module}: the import of mpi4py.MPI initialises MPI"


def test_numba_is_imported_by_kernels_and_kernels_only_when_used() -> None:
    for module in MODULES:
        for used, at_import in imports(module) if folder_of(module) != "kernels" else ():
            assert used.split(".")[0] not in ("numba", "llvmlite"), module
            assert not (at_import and used.startswith("hpcsgd.kernels")), f"{module}: that imports numba"
