"""The samples of "Adding a strategy", "a scheme" and "a family" work as their pages promise.

The blocks of a page that begin with the path of a file are its sample: a new module, the row of the registry,
and the row of the contract. They are added as the page describes, each suite of the contract is imported anew
with the sample's rows in place of its own, and all of its tests that then take one of these rows are tests of
this file.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from hpcsgd import compress, strategies, topology
from hpcsgd.errors import BadOption, HpcsgdError
from tests.support import compressor_rows, strategy_rows, topology_cases
from tests.support.markdown_pages import ROOT, Block, Page


class Sample:
    """The sample of one page.

    Parameters
    ----------
    page
        Path of the page.
    name
        Name in the registry.
    registry
        Registry that gets the row.
    contract
        Module of `tests.support` that gets the row of the contract.
    rows
        Names in that module to which the sample appends.
    wrong
        A text of the sample's module, and its replacement; for a sample that must fail.
    """

    def __init__(
        self,
        page: str,
        name: str,
        registry: dict[str, Any],
        contract: ModuleType,
        rows: tuple[str, ...],
        wrong: tuple[str, str] = ("", ""),
    ) -> None:
        self.page, self.name, self.registry, self.contract = page, name, registry, contract
        module, register, append = self.blocks()
        assert wrong[0] in module.text
        self.module = ModuleType(_dotted(module.file))
        text = module.text.replace(*wrong) if wrong[0] else module.text
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, self.module.__name__, self.module)  # where a dataclass looks
            _run(module, page, text, vars(self.module))
            patch.setitem(registry, name, None)
            _run(register, page, register.text, dict(vars(sys.modules[_dotted(register.file)])))
            self.entry = registry[name]
            assert self.entry is not None, f"{page} does not register {name!r}"
            self.rows = self._appended(append, rows)

    def blocks(self) -> list[Block]:
        """The blocks of the sample: module, row of the registry, row of the contract."""
        return [block for block in Page(ROOT / self.page).blocks if block.file]

    def _appended(self, block: Block, rows: tuple[str, ...]) -> dict[str, Any]:
        names = dict(vars(self.contract))
        empty = {name: type(names[name])() for name in rows}
        _run(block, self.page, block.text, names | empty)
        assert all(empty.values()), f"{self.page} appends nothing to one of {', '.join(rows)}"
        return empty

    def add(self, patch: pytest.MonkeyPatch, *, others: bool = False) -> None:
        """Do as the page describes; keep the rows of `others` too, or have the sample's alone."""
        patch.setitem(sys.modules, self.module.__name__, self.module)
        patch.setitem(self.registry, self.name, self.entry)
        for name, added in self.rows.items():
            known = getattr(self.contract, name)
            both = {**known, **added} if isinstance(known, dict) else [*known, *added]
            patch.setattr(self.contract, name, both if others else added)
        if self.contract is topology_cases:
            # Of each name in the registry there is a row without options.
            specs = [self.name, *self.rows["SPECS"]]
            cases = [(spec, size) for spec in specs for size in topology_cases.SIZES]
            patch.setattr(topology_cases, "SPECS", specs)
            patch.setattr(topology_cases, "CASES", cases)

    def is_meant(self, value: object) -> bool:
        """Whether a parameter of a test is a row of the sample, or its name."""
        keys = [key for rows in self.rows.values() for key in rows]
        names = (self.name, *(key for key in keys if isinstance(key, str)))
        return value in names if isinstance(value, str) else any(value is key for key in keys)

    def __str__(self) -> str:
        return self.name


def _dotted(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _run(block: Block, page: str, text: str, names: dict[str, Any]) -> None:
    """Run the text of a block, with the page's file and lines in tracebacks."""
    exec(compile("\n" * (block.line - 1) + text, str(ROOT / page), "exec"), names)


STRATEGY = ("hpcsgd/strategies/README.md", "periodic", strategies.STRATEGIES, strategy_rows, ("ROWS",))
SCHEME = (
    "hpcsgd/compress/README.md",
    "fixed16",
    compress.COMPRESSORS,
    compressor_rows,
    ("ROWS", "FAMILIES"),
)
FAMILY = ("hpcsgd/topology/README.md", "chords", topology.TOPOLOGIES, topology_cases, ("SPECS",))
PERIODIC, FIXED16, CHORDS = Sample(*STRATEGY), Sample(*SCHEME), Sample(*FAMILY)

#: The suites of each contract.
SUITES = {
    PERIODIC: ("contracts/test_strategies", "contracts/test_compressed_strategies"),
    FIXED16: (
        "contracts/test_compressors",
        "contracts/test_compressor_extremes",
        "contracts/test_point_to_point",
        "contracts/test_code_sum",
        "contracts/test_compressed",
        "compress/test_compressor_specs",
    ),
    CHORDS: ("topology/test_topology",),
}


def suite(file: str) -> ModuleType:
    """The tests of a file, imported anew: with the rows that there are now."""
    spec = importlib.util.spec_from_file_location(f"suite.{file}", ROOT / "tests" / f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contract_of(sample: Sample) -> Iterator[tuple[str, Callable[..., None]]]:
    """All tests of a contract that take a row of a sample, with these rows alone."""
    with pytest.MonkeyPatch.context() as patch:
        sample.add(patch)
        for file in SUITES[sample]:
            module = suite(file)
            if hasattr(module, "FEW"):  # rows for layouts that not all rows go through
                vars(module)["FEW"] = sample.rows["ROWS"]
            for name, function in list(vars(module).items()):
                if name.startswith("test_") and _take(sample, module, function):
                    yield (
                        f"test_{sample}_{file.rpartition('test_')[2]}_{name.removeprefix('test_')}",
                        function,
                    )


def _take(sample: Sample, module: ModuleType, function: Any) -> bool:
    """Leave a test the rows of the sample as its parameters; False where it takes none."""
    found, marks = _goes_through_rows(function), []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names, values, *others = mark.args
            meant = [value for value in values if any(map(sample.is_meant, _parts(value)))]
            found |= bool(meant)
            mark = pytest.mark.parametrize(names, meant or values, *others, **mark.kwargs).mark
        marks.append(mark)
    of_module = getattr(module, "pytestmark", [])
    marks += [mark.mark for mark in (of_module if isinstance(of_module, list) else [of_module])]
    function.pytestmark, function.sample = marks, sample
    return found


def _goes_through_rows(function: Any) -> bool:
    """Whether a test of other things goes through all rows by itself."""
    return "(c.ROWS if" in inspect.getsource(function) or "in c.ROWS if" in inspect.getsource(function)


def _parts(value: Any) -> tuple[Any, ...]:
    """The values of one set of parameters."""
    if hasattr(value, "marks") and hasattr(value, "values"):  # pytest.param(...)
        return tuple(value.values)
    return value if isinstance(value, tuple) else (value,)


for _sample in SUITES:
    globals().update(contract_of(_sample))


@pytest.fixture(autouse=True)
def _added(request: pytest.FixtureRequest) -> Iterator[None]:
    """The sample is in place while one of its tests runs."""
    with pytest.MonkeyPatch.context() as patch:
        if (sample := getattr(request.function, "sample", None)) is not None:
            sample.add(patch)
        yield


@pytest.mark.parametrize(("sample", "expected"), [(PERIODIC, 12), (FIXED16, 20), (CHORDS, 4)], ids=str)
def test_a_sample_runs_through_its_contract(sample: Sample, expected: int) -> None:
    found = [name for name in globals() if name.startswith(f"test_{sample}_")]
    assert len(found) >= expected


@pytest.mark.parametrize(
    ("sample", "file", "test"),
    [
        (PERIODIC, "contracts/test_strategies", "test_every_strategy_has_a_row"),
        (FIXED16, "contracts/test_compressors", "test_every_scheme_has_rows"),
    ],
    ids=str,
)
def test_the_contract_asks_for_the_row_that_the_page_names(sample: Sample, file: str, test: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        sample.add(patch, others=True)
        getattr(suite(file), test)()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sample.registry, sample.name, sample.entry)
        with pytest.raises(AssertionError):
            getattr(suite(file), test)()


@pytest.mark.mpi
def test_the_strategy_rejects_virtual_nodes_as_its_page_says(world: Any) -> None:
    (row,) = PERIODIC.rows["ROWS"]
    with pytest.raises(BadOption, match="no virtual nodes"):
        strategy_rows.start(row, world, virtual_nodes=2 * world.size)


@pytest.mark.mpi(min_size=2)
def test_a_wrong_strategy_fails(world_of: Any) -> None:
    wrong = Sample(*STRATEGY, ("self.context.step + 1", "self.context.step + 2"))
    (row,) = wrong.rows["ROWS"]
    with pytest.raises(AssertionError):
        suite("contracts/test_strategies").test_models_obey_the_recursion(world_of, (0, True), row)


def test_a_wrong_scheme_fails() -> None:
    wrong = Sample(*SCHEME, ("self._terms * top", "top"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        wrong.add(patch)
        suite("contracts/test_compressors").test_small_integers_are_exact(wrong.rows["ROWS"][0])


def test_a_wrong_family_fails() -> None:
    wrong = Sample(*FAMILY, ("(1, self.skip)", "(self.skip,)"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(HpcsgdError, match="not connected"):
        wrong.add(patch)
        topology_cases.made.cache_clear()
        suite("topology/test_topology").test_rows_sources_and_readers_agree_with_the_matrix(wrong.name)
    topology_cases.made.cache_clear()


@pytest.mark.parametrize("sample", SUITES, ids=str)
def test_a_page_lists_all_places(sample: Sample) -> None:
    text = (ROOT / sample.page).read_text()
    table = text.partition("All places")[2]
    files = [block.file for block in sample.blocks()]
    for file in files:
        assert f"| `{file}` |" in table, file
    for file in (line.split("`")[1] for line in table.splitlines() if line.startswith("| `")):
        assert file == files[0] or (ROOT / file).exists(), file
