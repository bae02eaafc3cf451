"""The steps of `jobs/gpu_check.sh`, most important first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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
        "test_rows_are_reduced_in_place[gpu-2-dtype0]",
        "test_weighted_sums[gpu-2-dtype0]",
    )
]


@dataclass(frozen=True)
class Sizes:
    """The words of the commands that a dry run makes smaller."""

    device: str
    kernels: str
    suites: str
    other_suites: str
    kib: str
    host_kib: str
    elements: str
    training: str
    repeats: int
    sanitizer: Sequence[str]


FULL = Sizes(
    device="cuda",
    kernels="tests/kernels/test_cuda_source.py -k gpu",
    suites="tests/contracts/test_collectives.py tests/contracts/test_strategies.py tests/compress "
    "tests/contracts/test_neighbour.py tests/training/test_steps.py tests/training/checkpoint",
    other_suites="tests/contracts tests/strategies tests/training tests/tensors tests/commands/train",
    kib="4,64,1024,4096,16384,65536,262144",
    host_kib="4,256,4096,65536",
    elements="134M",
    # A GPT of 100 M parameters, and 16384 tokens per rank and step. Buckets of the size of DDP's: processes
    # that share a GPU take turns, and each bucket waits for some.
    training="--models gpt:layers=14,heads=12,width=768,resnet18 --batch 64 --context 256 --bucket-mib 25",
    repeats=3,
    sanitizer=["python", "-m", "pytest", "-q", *SMALLEST_TESTS],
)
TINY = Sizes(
    device="cpu",
    kernels="tests/kernels/test_quantise.py -k one_element",
    suites="tests/devices tests/strategies/test_closing_rule.py",
    other_suites="tests/devices tests/strategies/test_delays.py",
    kib="4",
    host_kib="4",
    elements="64k",
    training="--models logistic,gpt:layers=1,heads=2,width=16 --batch 2 --context 32",
    repeats=1,
    sanitizer=["--version"],  # without a GPU there is nothing to run under it
)


@dataclass
class Step:
    """One command of the check.

    Attributes
    ----------
    name
        Name in the report.
    words
        The command. The words python and CSV stand for the interpreter and a file of results.
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

    The suites of 1 and 4 ranks come after the figures of 2, which a hanging test would otherwise cost. A dry
    run has at most 2 ranks, and leaves out a step that would then repeat an earlier one.
    """
    if not dry_run:
        return _steps(FULL)
    planned: dict[tuple[str, int], Step] = {}
    for step in _steps(TINY):
        step = replace(step, ranks=min(step.ranks, 2))
        planned.setdefault((" ".join(step.words), step.ranks), step)
    return list(planned.values())


def _steps(sizes: Sizes) -> list[Step]:
    device, repeats = f"--device {sizes.device}", f"--repeats {sizes.repeats} --csv CSV"
    pytest = ["python", "-m", "pytest", "-v", "-m", "not long", "--device", sizes.device]
    suites, other_suites = [*pytest, *sizes.suites.split()], [*pytest, *sizes.other_suites.split()]

    def tests(name: str, words: str, seconds: float) -> Step:
        return Step(name, f"python -m pytest -q {words}".split(), seconds)

    def bench(name: str, words: str, seconds: float, ranks: int = 0) -> Step:
        # Ranks that wait in vain end with an error that names the others, before the step is ended.
        limit = {"HPCSGD_TIMEOUT": "40"}
        return Step(
            f"bench {name}", f"python -m hpcsgd bench {words}".split(), seconds, ranks, variables=limit
        )

    def sanitizer(tool: str) -> Step:
        # Each tensor in an allocation of its own: an access beyond its end is then outside of memory.
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        words = ["--tool", tool, "--error-exitcode", "1", *sizes.sanitizer]
        return Step(f"sanitizer: {tool}", words, 60, 0, "compute-sanitizer", own)

    compress = f"compress {device} --schemes {SCHEME} --elements {sizes.elements} --data gaussian {repeats}"
    allreduce = f"allreduce {device} --sizes {sizes.kib} {repeats}"
    train = f"step {device} --dtype bfloat16 {sizes.training} --compress {SCHEME} {repeats}"
    host = f"allreduce --sizes {sizes.host_kib} {repeats}"
    return [
        Step("device", ["python", "-m", "jobs.gpu_check.facts", sizes.device], 60),
        tests("kernels' tests on the device", sizes.kernels, 90),
        Step("suites, 2 ranks", suites, 100, 2),
        bench("compress", compress, 45),
        bench("allreduce, 2 ranks", allreduce, 60, 2),
        bench("step, 2 ranks", train, 80, 2),
        Step("suites, 1 rank", suites, 60, 1),
        Step("suites, 4 ranks", suites, 75, 4),
        Step("suites, others", other_suites, 75, 2),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        *(bench(f"allreduce on the host, {n} ranks", host, 40, n) for n in (2, 4, 8, 16)),
        bench("allreduce, 4 ranks", allreduce, 60, 4),
        tests("kernels' other tests", sizes.kernels if sizes is TINY else "tests/kernels -k not(gpu)", 90),
    ]
