"""The steps of `jobs/gpu_check.sh`, most important first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

GPT = "gpt:layers=14,heads=12,width=768"  # 100 M parameters
SCHEME = "maxnorm:bits=4"
#: Tests that together launch each kernel of the .cu sources a few times; a sanitizer slows a launch a lot.
SMALLEST_TESTS = [
    f"tests/kernels/test_cuda_source.py::{test}"
    for test in (
        "test_codes[gpu-plan5-True-dtype0]",
        "test_norms_of_non_finite_values[gpu-inf]",
        "test_rotation_in_place[gpu]",
        "test_rotation[gpu-dtype2]",
        "test_coordinates[gpu-dtype0]",
        "test_passes_of_an_average[gpu-0-dtype0]",
    )
]
SUITES = ["tests/devices", "tests/contracts", "tests/strategies", "tests/training"]


@dataclass
class Step:
    """One command of the check.

    Attributes
    ----------
    name
        Name in the report.
    words
        The command. `PYTHON` and `CSV` stand for the interpreter and a file of results.
    seconds
        Its time limit.
    ranks
        Ranks that mpiexec starts; 0: no mpiexec.
    program
        A program without which the step is skipped; it comes before the command. Default: none.
    variables
        Further environment variables.
    """

    name: str
    words: Sequence[str]
    seconds: float
    ranks: int = 0
    program: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


def steps(dry_run: bool) -> list[Step]:
    """All steps, most important first: a machine may go away early.

    The suites of 1 and 4 ranks come after the figures of 2, which a hanging test would otherwise cost.
    """
    device = "cpu" if dry_run else "cuda"
    bench = ["PYTHON", "-m", "hpcsgd", "bench"]
    pytest = ["PYTHON", "-m", "pytest", "-q"]
    results = ["--csv", "CSV"]
    kernels = (
        ["tests/kernels/test_quantise.py", "-k", "one_element"]
        if dry_run
        else ["tests/kernels/test_cuda_source.py", "-k", "gpu"]
    )
    folders = ["tests/devices", "tests/strategies/test_closing_rule.py"] if dry_run else SUITES
    suites = [*pytest, "--device", device, "-m", "not long", *folders]
    sizes = "4" if dry_run else "4,64,1024,4096,16384,65536,262144"
    allreduce = [*bench, "allreduce", "--repeats", "1" if dry_run else "3", *results]
    on_device = [*allreduce, "--device", device, "--sizes", sizes]
    elements = "64k" if dry_run else "134M"
    compress = [*bench, "compress", "--device", device, "--schemes", SCHEME, "--elements", elements]
    models = "logistic,gpt:layers=1,heads=2,width=16" if dry_run else f"{GPT},resnet18"
    batch = (
        ["--batch", "2", "--repeats", "1"]
        if dry_run
        else ["--batch", "64", "--context", "256", "--repeats", "5"]
    )
    train = [*bench, "step", "--device", device, "--dtype", "bfloat16", "--models", models, *batch]
    host = [*allreduce, "--sizes", "4" if dry_run else "4,256,4096,65536"]
    smallest = [*pytest, *SMALLEST_TESTS]
    # Each tensor in an allocation of its own: accesses beyond its end are then outside of memory.
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def sanitizer(tool: str) -> Step:
        options = ["--tool", tool, "--error-exitcode", "1"]
        return Step(f"sanitizer: {tool}", [*options, *smallest], 75, 0, "compute-sanitizer", own)

    planned = [
        Step("device", ["PYTHON", "-m", "jobs.gpu_check.facts", device], 60),
        Step("kernels' tests on the device", [*pytest, *kernels], 90),
        Step("suites, 2 ranks", suites, 110, 2),
        Step(
            "bench compress",
            [*compress, "--data", "gaussian", "--repeats", "1" if dry_run else "5", *results],
            45,
        ),
        Step("bench allreduce, 2 ranks", on_device, 60, 2),
        Step("bench step, 2 ranks", [*train, "--compress", SCHEME, *results], 90, 2),
        Step("suites, 1 rank", suites, 70, 1),
        Step("suites, 4 ranks", suites, 90, 4),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Step("bench allreduce, 4 ranks", on_device, 60, 4),
        *(Step(f"bench allreduce on the host, {n} ranks", host, 45, n) for n in (2, 4, 8, 16)),
        Step(
            "kernels' other tests",
            [*pytest, "tests/kernels", "-k", "one_element" if dry_run else "not gpu"],
            90,
        ),
    ]
    for step in planned:
        step.ranks = min(step.ranks, 2) if dry_run else step.ranks
    return planned
