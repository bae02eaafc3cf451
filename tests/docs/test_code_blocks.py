"""Code of the documentation: shell commands parse, Python runs, TOML is read."""

from __future__ import annotations

import functools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

import hpcsgd
from hpcsgd.commands.train import settings
from tests.support.command_lines import Wrong, check, check_names
from tests.support.markdown_pages import ROOT, Block, Page, pages

PAGES = pages()
#: Output, drawings and formulas are `text`, and not checked.
LANGUAGES = {"bash", "python", "diff", "toml", "text"}

TRAINING = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loss_fn = nn.CrossEntropyLoss()
loader = [(torch.randn(5, 3), torch.randint(2, (5,))) for _ in range(12)]
"""


def by_name(page: Page) -> str:
    return page.name


def blocks(language: str) -> list[Any]:
    """The blocks of all pages in one language, as parameters of a test."""
    return [
        pytest.param(block, id=f"{page.name}:{block.line}")
        for page in PAGES
        for block in page.blocks
        if block.language == language
    ]


def snippets(page: Page) -> list[Block]:
    """The Python blocks of a page but samples of files, which test_samples.py puts in their places."""
    return [block for block in page.blocks if block.language == "python" and not block.file]


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`hpcsgd.Run` on this rank alone, whatever started the test; closed at its end."""
    runs = []

    def run(*args: Any, **options: Any) -> hpcsgd.Run:
        runs.append(real(*args, comm=MPI.COMM_SELF, **options))
        return runs[-1]

    real = hpcsgd.Run
    monkeypatch.setattr(hpcsgd, "Run", functools.wraps(real)(run), raising=False)
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    for each in runs:
        each.close()
    torch.set_num_threads(threads)


def trained(script: str) -> list[torch.Tensor]:
    """The parameters after a training script."""
    names: dict[str, Any] = {}
    exec(compile(script, "script", "exec"), names)
    return [parameter.detach().clone() for parameter in names["model"].parameters()]


def sides(diff: str) -> tuple[str, str]:
    """The text before a diff and after it; of each line the first two columns are a mark."""
    marked = [(line[:2].strip(), line[2:]) for line in diff.splitlines()]
    before, after = (
        "\n".join(line for mark, line in marked if mark in ("", side)) + "\n" for side in ("-", "+")
    )
    return before, after


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_block_has_a_language(page: Page) -> None:
    assert {block.language for block in page.blocks} <= LANGUAGES
    assert page.text.count("```") == 2 * len(page.blocks)


@pytest.mark.parametrize("block", blocks("bash"))
def test_shell_commands_parse(block: Block) -> None:
    check(block.text)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_in_prose_exist(page: Page) -> None:
    for span in page.spans:
        if (
            re.match(r"(hpcsgd|mpiexec|srun|sbatch|python3?|\w+=\S+ jobs/\S+|jobs/\S+) \S", span)
            and "…" not in span
        ):
            check_names(span)
        for option in re.findall(r"^(--[a-z][a-z-]*)", span):
            assert option in options_of_any_program(), f"{page.name}: {span}"


@functools.cache
def options_of_any_program() -> set[str]:
    from hpcsgd.commands.cli import cli

    found, commands = set(), [cli]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        found |= {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    scripts = [*(ROOT / "jobs").glob("*.sbatch"), ROOT / "jobs/gpu_check/__main__.py"]
    others = "".join(path.read_text() for path in scripts)
    return found | set(re.findall(r"--[a-z][a-z-]*", others)) | FOREIGN_OPTIONS


#: Options of Docker and Apptainer.
FOREIGN_OPTIONS = {"--bind", "--nv", "--shm-size"}


@pytest.mark.parametrize("block", blocks("toml"))
def test_toml_is_settings(block: Block) -> None:
    table = tomllib.loads(block.text)
    runs = table.pop("run", [{}])
    for run in runs:
        settings.validate(settings.merge(table, run))


@pytest.mark.parametrize("block", blocks("diff"))
@pytest.mark.usefixtures("one_rank")
def test_a_diff_leaves_one_rank_as_it_was(block: Block) -> None:
    before, after = sides(block.text)
    assert before != after
    for old, new in zip(trained(TRAINING + before), trained(TRAINING + after), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=by_name)
@pytest.mark.usefixtures("one_rank")
def test_python_runs(page: Page) -> None:
    """The blocks of a page one after another, in the names of a training script."""
    names: dict[str, Any] = {"hpcsgd": hpcsgd, "__name__": page.name}
    exec(TRAINING, names)
    for block in snippets(page):
        exec(compile("\n" * (block.line - 1) + block.text, page.name, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if page.sample_files], ids=by_name)
def test_samples_of_files_have_a_test(page: Page) -> None:
    assert page.name.removesuffix("/README.md") in (Path(__file__).parent / "test_samples.py").read_text()


@pytest.mark.parametrize("command", ["train", "test"])
def test_ci_finds_the_commands_of_the_readme(command: str) -> None:
    """As `.ci/run` does: from the mark to the end of the block, without these two and the fences."""
    readme = next(page for page in PAGES if page.name == "README.md")
    lines = readme.text.partition(f"<!-- command: {command} -->\n")[2].partition("\n```\n")[0].splitlines()
    assert lines[0] == "```bash" and len(lines) == 4
    assert "hpcsgd train" in lines[-1] or "pytest" in lines[-1]


RIGHT = """
mpiexec -n 4 hpcsgd train --data text --model gpt:layers=2 \\
        --strategy local:period=8   # a comment; with $(marks)
OMP_NUM_THREADS=1 HPCSGD_TIMEOUT=9 mpiexec -n 2 hpcsgd doctor --out runs && hpcsgd report runs/* > out.txt
python tests/lab/hosts.py --hosts 4 --rate 1gbit -- $(which hpcsgd) bench compress --schemes "maxnorm;ef+topk"
sbatch --nodes=4 jobs/train.sbatch --data cifar10:path=$HOME/cifar
python -m pytest -m "mpi and not long" tests/docs
pip install -c constraints.txt -e '.[mpich,test]'
hpcsgd sbatch train --nodes 4 --requeue -- --data text > job.sbatch
"""


def test_right_commands_pass() -> None:
    check(RIGHT)


@pytest.mark.parametrize(
    "line",
    [
        "hpcsgd trian",
        "hpcsgd",
        "hpcsgd bench",
        "hpcsgd train --strateggy local",
        "mpiexec -n 2 hpcsgd train --strategy locall",
        "mpiexec -n 2 hpcsgd train --strategy local:periods=8",
        "mpiexec --wrong 2 hpcsgd train",
        "hpcsgd train --compress maxnorm:bits=three",
        "hpcsgd train --compress efe+maxnorm",
        "hpcsgd train --epochs many",
        "hpcsgd train --on-failure ignore",
        "hpcsgd train --data digits:paths=x",
        "hpcsgd train --model gpt:layer=2",
        "hpcsgd train --optimizer adamm",
        "hpcsgd train --delays slow:peers=1",
        "hpcsgd bench step --batches 4",
        'hpcsgd bench async --methods "allreduce;lasgdd"',
        "hpcsgd topology ringg -n 4",
        "hpcsgd serve",
        "hpcsgd sbatch train -- --dat text",
        "jobs/no.sh",
        "jobs/async.sh runs/x --no 2",
        "HOST=x jobs/mpirun.sh",
        "HPCSGD_" + "NO=1 hpcsgd train",
        "sbatch jobs/no.sbatch",
        "sbatch --node=3 jobs/train.sbatch",
        "sbatch jobs/ps_server.sbatch --listten x",
        "python tests/lab/no.py",
        "python tests/lab/hosts.py --host 4 -- hpcsgd train",
        "python tests/lab/hosts.py --hosts 4 -- hpcsgd trian",
        "python -m pytest tests/no",
        "python -m pytest -m slow",
        "pip install '.[mpi]'",
        "unknown program",
        "hpcsgd train 'unclosed",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises(Wrong):
        check(line)


@pytest.mark.parametrize("span", ["hpcsgd trian", "hpcsgd train --confg", "jobs/no.sh x", "hpcsgd bench no"])
def test_a_wrong_name_in_prose_is_found(span: str) -> None:
    with pytest.raises(Wrong):
        check_names(span)


@pytest.mark.usefixtures("one_rank")
def test_a_diff_that_changes_the_result_is_found() -> None:
    before, after = sides("  optimizer.zero_grad()\n- model[0].bias.data += 1\n+ model[0].bias.data += 2\n")
    pairs = zip(trained(TRAINING + before), trained(TRAINING + after), strict=True)
    assert not all(torch.equal(old, new) for old, new in pairs)
    assert shlex.split(before)[-1] == "1"
