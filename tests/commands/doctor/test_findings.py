"""Each mistake in facts yields its finding, and facts of a healthy job yield none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcsgd.commands.doctor import cores, layout, leftovers, network, shared_memory, storage
from hpcsgd.commands.doctor.check import Facts, Finding, name_ranks
from hpcsgd.commands.doctor.checks import CHECKS

GB = 10**9


def healthy(rank: int, nodes: int = 2, per_node: int = 2) -> Facts:
    """The facts of a rank of a healthy job."""
    node, local = divmod(rank, per_node)
    first = [n * per_node for n in range(nodes)]
    found: dict[str, dict[tuple[int, int], tuple[float, float]]] = {"inside": {}, "between": {}}
    for kind, rounds in (
        ("inside", network.pairs_inside_nodes([[f, f + 1] for f in first])),
        ("between", network.pairs_between_nodes([[f] for f in first])),
    ):
        found[kind] = {pair: (1e-6, 1e10) for pairs in rounds for pair in pairs if pair[0] == rank}
    return {
        "versions": {"hpcsgd": "0.1.0", "torch": "2.13.0", "Python": "3.11.7"},
        "python": "/env/bin/python",
        "host": f"h{node}",
        "machine": f"machine {node}",
        "node": node,
        "cores": frozenset(range(local * 4, local * 4 + 4)),
        "machine cores": 8,
        "quota": None,
        "threads": 4,
        "busy cores": dict.fromkeys(range(8), 0.02),
        "own cores": 0.01,
        "programs": [],
        "OMP_NUM_THREADS": "4",
        "mpi": "MPICH 5.0.2",
        "mpi problem": "",
        "thread level": "MULTIPLE",
        "failed ranks": "",
        "mpi cuda": False,
        "cuda aware": False,
        "launched": {"PMI_SIZE": nodes * per_node, "MPI_LOCALNRANKS": per_node},
        "size": nodes * per_node,
        "mpiexec beside": "/env/bin/mpiexec",
        "mpiexec in PATH": "/usr/bin/mpiexec",
        "shm": (16 * GB, 15 * GB),
        "window": "",
        "shared files": [],
        "links": found,
        "skews": dict.fromkeys(first[1:], (0.001, 0.0001)) if rank == 0 else {},
        "resolution": 1e-9,
        "gpus": ["H100", "H100"],
        "driver": True,
        "torch cuda": "13.0",
        "visible": None,
        "cupy": "CuPy 14",
        "gpu": f"GPU {node} {local}",
        "kernel": "",
        "compiled": True,
        "cache": "/cache",
        "kernel seconds": 0.1,
        "folder": "/scratch/runs",
        "write problem": "",
        "fsync": 0.001,
        "free": 100 * GB,
        "seen": 0.01 if rank else None,
        "torn": 0,
    }


def found(ranks: list[Facts]) -> list[Finding]:
    return [finding for check in CHECKS for finding in check.diagnose(ranks)]


def job(nodes: int = 2, **changed: Any) -> list[Facts]:
    """All ranks with these facts changed."""
    return [healthy(rank, nodes) | changed for rank in range(2 * nodes)]


def one(rank: int, **changed: Any) -> list[Facts]:
    """One rank with these facts changed."""
    return [facts | changed if r == rank else facts for r, facts in enumerate(job())]


ALONE = [healthy(0, 1, 1) | {"links": {"inside": {}, "between": {}}}]


@pytest.mark.parametrize(
    "ranks", [job(), job(4), job(1), ALONE], ids=["2 nodes", "4 nodes", "1 node", "alone"]
)
def test_healthy_job_has_no_findings_and_all_checks_have_lines(ranks: list[Facts]) -> None:
    assert not found(ranks)
    for check in CHECKS:
        assert all(check.describe(ranks)) or check.name == "memory", check.name


def alone(**changed: Any) -> list[Facts]:
    return [ALONE[0] | changed]


VERSIONS = healthy(0)["versions"]
SLOW = {"inside": {}, "between": {(2, 4): (1e-6, 1e9)}}
FILES = [
    leftovers.SharedFile("mpich_shm_1_0", "MPICH", "ada", 2_100_000, ()),
    leftovers.SharedFile("mpich_shm_2_0", "MPICH", "ada", 2_100_000, (3, 4, 5, 6)),
    leftovers.SharedFile("sm_segment.h1.7.1.0", "Open MPI", "bob", 16_800_000, None),
]
#: The level, part of the problem's text and of its fix, and the facts.
MISTAKES: dict[str, tuple[str, str, str, list[Facts]]] = {
    "size 1 under MPICH's mpiexec": (
        "error",
        "started 4 ranks (PMI_SIZE=4), but each is alone: mpi4py uses Open MPI v5",
        "start with /env/bin/mpiexec",
        alone(launched={"PMI_SIZE": 4}, mpi="Open MPI v5"),
    ),
    "size 1 under Open MPI's mpiexec": (
        "error",
        "Open MPI's mpiexec started 4 ranks (OMPI_COMM_WORLD_SIZE=4), but each is alone: MPICH does not",
        "start with /env/bin/mpiexec",
        alone(
            launched={"OMPI_COMM_WORLD_SIZE": 4},
            mpi="",
            **{"mpi problem": "MPICH does not start under Open MPI's mpiexec"},
        ),
    ),
    "size 1 under srun": (
        "error",
        "srun started 8 ranks",
        "srun --mpi=pmi2",
        alone(launched={"SLURM_STEP_NUM_TASKS": 8}),
    ),
    "no MPI": (
        "error",
        "no MPI library: cannot load",
        "'.[mpich]'",
        alone(launched={}, mpi="", **{"mpi problem": "cannot load libmpi"}),
    ),
    "versions": (
        "error",
        "ranks use different versions of torch (2.13.0: ranks 0-2; 2.12.0: rank 3 on h1)",
        "one environment",
        one(3, versions=VERSIONS | {"torch": "2.12.0"}),
    ),
    "two MPIs": ("error", "different MPI libraries", "load the same MPI", one(1, mpi="MPICH 4.3")),
    "thread level": (
        "warning",
        "only MPI_THREAD_FUNNELED on every rank",
        "MPI_THREAD_MULTIPLE",
        job(**{"thread level": "FUNNELED"}),
    ),
    "not CUDA-aware": (
        "error",
        "HPCSGD_CUDA_AWARE=1 on every rank, but this MPI is not CUDA-aware",
        "unset HPCSGD_CUDA_AWARE",
        job(**{"cuda aware": True}),
    ),
    "CUDA-aware here and there": (
        "error",
        "HPCSGD_CUDA_AWARE=1 on rank 2 on h1 only",
        "-genv",
        one(2, **{"cuda aware": True, "mpi cuda": True}),
    ),
    "one core for all": (
        "error",
        "ranks 0-1 may use one core only, core 3 of 8 on h0",
        "-bind-to none",
        job(cores=frozenset([3])),
    ),
    "one core each": (
        "warning",
        "bound to one of the 8 cores of h0, with two threads per rank: ranks 0-1",
        "-bind-to none",
        [facts | {"cores": frozenset([r]), "threads": 1} for r, facts in enumerate(job())],
    ),
    "too many threads": (
        "warning",
        "more threads than cores: 128 threads of 2 ranks on 8 cores of h0",
        "export OMP_NUM_THREADS=4",
        job(threads=64, OMP_NUM_THREADS="64"),
    ),
    "threads of a container": (
        "warning",
        "more threads than cores: 8 threads of 2 ranks on 2 cores",
        "export OMP_NUM_THREADS=1",
        job(quota=2.5),
    ),
    "OMP_NUM_THREADS not set": (
        "warning",
        "OMP_NUM_THREADS is not set: 16 threads",
        "export OMP_NUM_THREADS=4",
        job(threads=8, OMP_NUM_THREADS=None),
    ),
    "too many ranks": (
        "warning",
        "more ranks than cores: 2 on 1 core of",
        "start 1 on each",
        job(threads=1, cores=frozenset([0]), **{"machine cores": 1}),
    ),
    "a busy machine": (
        "warning",
        "h1 is busy: other programs use 3.8 of 8 cores; the ranks need 8; most by cc1 (1.5, process 77)",
        "--exclusive",
        one(2, **{"busy cores": dict.fromkeys(range(12), 0.48), "programs": [("cc1", 77, 1.5)]}),
    ),
    "late messages inside a node": (
        "warning",
        "the latency inside a node is 300 µs, from h0 (rank 0) to h0 (rank 1)",
        "shared memory",
        one(0, links={"inside": {(0, 1): (300e-6, 1e10)}, "between": {}}),
    ),
    "late messages between nodes": (
        "warning",
        "the latency between nodes is 2,000 µs, from h0 (rank 0) to h1 (rank 2)",
        "UCX_NET_DEVICES",
        one(0, links={"inside": {}, "between": {(0, 2): (2e-3, 1e10)}}),
    ),
    "late messages of too many ranks": (
        "warning",
        "more ranks than cores: 2 on 1 core of",
        "start 1 on each",
        [
            facts | {"links": {"inside": {(r, r + 1): (5e-3, 1e10)} if r % 2 == 0 else {}, "between": {}}}
            for r, facts in enumerate(job(threads=1, cores=frozenset([0]), **{"machine cores": 1}))
        ],
    ),
    "one machine as two nodes": (
        "warning",
        "every rank: one machine that MPI treats as 2 nodes",
        "--ipc=host",
        job(machine="one"),
    ),
    "one node with two names": (
        "warning",
        "one node with several names (h0, other)",
        "one host name",
        one(1, host="other"),
    ),
    "two machines with one name": (
        "warning",
        "several machines have the host name node",
        "its own",
        job(host="node"),
    ),
    "small /dev/shm": (
        "warning",
        "/dev/shm of h1 has 50 of 64 MB free; 2 ranks with a model of 100 MB need 400 MB",
        "--shm-size=1g",
        [facts | ({"shm": (64_000_000, 50_000_000)} if r > 1 else {}) for r, facts in enumerate(job())],
    ),
    "no windows": ("warning", "no shared memory on h0 (not allowed)", "/dev/shm", job(window="not allowed")),
    "files of an ended job": (
        "warning",
        "/dev/shm of h1 has 1 file of ended jobs, 2.1 MB of memory, mapped by no process: mpich_shm_1_0",
        "on h1: rm /dev/shm/mpich_shm_1_0",
        [facts | ({"shared files": FILES} if r == 2 else {}) for r, facts in enumerate(job())],
    ),
    "a slow link": (
        "warning",
        "the link h1 (rank 2) to h2 (rank 4) has a bandwidth of 1.00 GB/s, the median is 10.00 GB/s",
        "srun --exclude",
        [facts | ({"links": SLOW} if r == 2 else {}) for r, facts in enumerate(job(4))],
    ),
    "clocks": (
        "warning",
        "the clock of h1 (rank 2) is 3.0 s behind that of h0 (rank 0)",
        "chrony",
        one(0, skews={2: (-3.0, 0.001)}),
    ),
    "GPUs on some": (
        "error",
        "no GPU on rank 3 on h1",
        "--device cpu",
        one(3, gpus=[], gpu="", driver=False),
    ),
    "GPUs unseen": (
        "warning",
        "torch finds no GPU on every rank; this torch is built without CUDA",
        "pytorch.org",
        job(gpus=[], gpu="", **{"torch cuda": ""}),
    ),
    "GPUs shared": ("warning", "2 ranks share 1 GPU on h0", "as many ranks", job(gpu="GPU 0")),
    "no CuPy": ("warning", "no CuPy (No module", "'.[gpu]'", job(cupy="no CuPy (No module named 'cupy')")),
    "a GPU kernel": ("error", "NVRTC_ERROR", "cupy-cuda13x", one(0, kernel="CompileException: NVRTC_ERROR")),
    "no cache": ("warning", "no folder for compiled kernels", "NUMBA_CACHE_DIR", job(cache="")),
    "a wrong kernel": ("error", "gives wrong results on rank 1", "numba", one(1, compiled=False)),
    "a folder of one node": (
        "error",
        "/scratch/runs is not shared by all nodes: files of rank 0 are not visible on ranks 2-3",
        "--out",
        [facts | ({"seen": -1.0} if r > 1 else {}) for r, facts in enumerate(job())],
    ),
    "a folder seen late": (
        "warning",
        "visible more than 1 s later on rank 3 on h1",
        "actimeo",
        one(3, seen=2.0),
    ),
    "a folder that cannot be written": (
        "error",
        "rank 0 cannot write runs: denied",
        "--out",
        one(0, **{"write problem": "denied"}),
    ),
    "a file replaced in two steps": ("warning", "missing or incomplete", "--out", one(2, torn=1)),
    "a full disk": ("warning", "12 MB free", "--out", one(0, free=12_000_000)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_and_nothing_else(name: str) -> None:
    level, problem, fix, ranks = MISTAKES[name]
    findings = found(ranks)
    once = {(finding.level, finding.fix) for finding in findings}
    assert len(once) == 1, findings
    assert findings[0].level == level
    assert any(problem in finding.problem for finding in findings), findings
    assert fix in findings[0].fix, findings
    for check in CHECKS:
        list(check.describe(ranks))


def test_ranks_that_share_free_cores_are_no_mistake() -> None:
    everyone = frozenset(range(8))
    assert not found(job(cores=everyone)), "8 threads on 8 cores"
    assert not found(job(quota=8.0))


def test_the_load_of_the_ranks_and_of_cores_to_spare_is_no_mistake() -> None:
    own = {"busy cores": dict.fromkeys(range(8), 1.0), "own cores": 3.9}
    assert not found(job(**own)), "the ranks themselves use 7.8 of 8 cores"
    assert found(job(**own | {"own cores": 3.0}))
    half = {core: float(core < 4) for core in range(8)}
    assert not found(job(threads=2, **{"busy cores": half})), "4 threads beside 4 other cores"
    assert not found(job(quota=8.0, cores=frozenset(range(16)), **{"busy cores": half}))
    assert not found(job(**{"busy cores": {}})), "no /proc/stat"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_every_node_is_paired_with_its_neighbours_one_at_a_time(count: int) -> None:
    nodes = [[2 * n, 2 * n + 1] for n in range(count)]
    rounds = network.pairs_between_nodes(nodes)
    for pairs in rounds:
        ends = [rank for pair in pairs for rank in pair]
        assert len(ends) == len(set(ends))
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    expected = (
        {frozenset({nodes[n][0], nodes[(n + 1) % count][0]}) for n in range(count)} if count > 1 else set()
    )
    assert set(met) == expected and len(met) == len(expected)
    assert network.pairs_inside_nodes([*nodes, [99]]) == [[(2 * n, 2 * n + 1) for n in range(count)]]


@pytest.mark.parametrize(("text", "threads"), [("", 0), ("8", 8), (" 4,2 ", 4), ("many", 0)])
def test_requested_threads_are_parsed(text: str, threads: int) -> None:
    assert cores._requested_threads(text) == threads


def test_required_shared_memory_grows_with_the_ranks_of_a_node() -> None:
    assert shared_memory.required_bytes(4) == 2 * shared_memory.required_bytes(2)


def test_names_of_ranks_are_short() -> None:
    ranks = job(4)
    assert name_ranks([3], ranks) == "rank 3 on h1"
    assert name_ranks([0, 1, 2, 5, 7], ranks) == "ranks 0-2, 5, 7"
    assert name_ranks(list(range(8)), ranks) == "every rank"
    assert name_ranks([0], ALONE) == "rank 0 on h0"


def test_the_page_is_narrow_short_and_has_errors_first() -> None:
    findings = [Finding("warning", "tardy " * 40, "faster"), Finding("error", "broken", "mend it")]
    checked = {check.name: list(check.describe(job(4))) for check in CHECKS}
    lines = list(layout.lines("doctor", checked, findings))
    assert len(lines) < 45 and all(len(line) <= layout.WIDTH + 10 for line in lines)
    text = "\n".join(lines)
    assert text.index("broken") < text.index("mend it") < text.index("tardy")
    assert "no mistakes" in list(layout.lines("doctor", {}, []))[-1]


def test_file_visible_at_once_has_no_delay(tmp_path: Path) -> None:
    """The time is never negative: a negative time marks a folder that is not shared."""
    path = tmp_path / "file"
    path.write_bytes(bytes([storage._VERSIONS - 1]) * storage._BYTES)
    assert storage._watch(path) == {"seen": 0.0, "torn": 0}
