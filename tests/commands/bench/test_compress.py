"""The compression benchmark: every kernel and method runs once, with a correct result and a CSV line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from hpcsgd import World
from hpcsgd.commands.bench import baselines
from hpcsgd.commands.bench.compress import command, ddp_hooks, gradients
from hpcsgd.commands.bench.compress.codec_timing import PHASES
from hpcsgd.commands.bench.compress.contenders import error_bound
from hpcsgd.commands.bench.compress.problem import AveragingProblem
from hpcsgd.commands.bench.options import CompressOptions
from hpcsgd.commands.cli import cli
from hpcsgd.compress import build
from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.kernels.codec import host
from hpcsgd.kernels.sums import model_delta

pytestmark = pytest.mark.mpi

RANKS = MPI.COMM_WORLD.size
ELEMENTS = 20_000
KERNELS = ["memory copy", "norms", "encode", "encode with residual", "decode", "rotate", "unrotate"]
KERNELS += ["snapshot", "advance", "merge"]
PEERS = ["torch PowerSGD hook", "torch fp16 hook", "gloo float32"]


def read(path: Path) -> list[dict[str, str]]:
    MPI.COMM_WORLD.Barrier()
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_line_per_kernel_method_and_phase(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = Path(MPI.COMM_WORLD.bcast(str(tmp_path)), "results", "compress.csv")
    command.main(CompressOptions(elements=ELEMENTS, data="gaussian", repeats=1, csv=path))
    rows = read(path)
    kernels = [row for row in rows if row["phase"] == "kernel"]
    assert [row["method"] for row in kernels] == KERNELS
    schemes = list(CompressOptions().schemes)
    whole = {row["method"]: row for row in rows if row["phase"] == "all-reduce"}
    assert list(whole) == ["memory copy", "float32", *schemes, *PEERS]
    for phase in PHASES:
        assert [r["method"] for r in rows if r["phase"] == phase] == ["memory copy", *schemes]
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"])
        assert (int(row["elements"]), int(row["ranks"])) == (ELEMENTS, RANKS)
    assert ("maxnorm" in capfd.readouterr().out) == (MPI.COMM_WORLD.rank == 0)
    if RANKS > 1:
        bits = {name: row["bits_per_element"] for name, row in whole.items()}
        assert float(bits["float32"]) == 32 and float(bits["fp16"]) == pytest.approx(16, rel=0.01)
        assert float(bits["maxnorm:bits=2"]) < float(bits["maxnorm:bits=4"]) < float(bits["maxnorm:bits=8"])
        assert not any(bits[name] for name in ("memory copy", *PEERS)), "only our own bytes are counted"
        assert 0.1 < float(whole["maxnorm:bits=4"]["relative_error"]) < 0.3


def test_recorded_gradients_differ_between_ranks_and_are_large_in_few_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients, "STEPS", 1)
    monkeypatch.setattr(gradients, "BATCH", 2)
    with World(device="cpu") as world:
        own = torch.cat([g.flatten() for g in gradients.resnet18(world)])
        assert own.numel() == sum(g.numel() for g in gradients.gaussian(world)) == 11_173_962
        assert own.abs().max() > 20 * own.std()
        assert len(set(world.gather(float(own.norm())))) == world.size


@pytest.mark.parametrize("elements", [1, 7, 24, 25])
def test_gradients_are_repeated_or_cut(elements: int) -> None:
    parts = gradients.resize([torch.arange(6.0).view(2, 3), torch.arange(6.0, 12)], elements)
    together = torch.cat([part.flatten() for part in parts])
    assert torch.equal(together, torch.arange(elements).remainder(12).float())
    assert parts[0].shape == ((2, 3) if elements >= 6 else (elements,))


def test_gradients_are_cut_between_rows() -> None:
    parts = gradients.resize([torch.zeros(4, 3), torch.zeros(5)], 17 + 8)
    assert [tuple(part.shape) for part in parts] == [(4, 3), (5,), (2, 3), (2,)]


def test_wrong_mean_raises_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = baselines.gloo_mean

    def wrong(flat: Tensor) -> None:
        right(flat)
        flat[: len(flat) // 2] *= 1.01

    monkeypatch.setattr(baselines, "gloo_mean", wrong)
    with pytest.raises(HpcsgdError, match="gloo float32 is wrong"):
        command.main(CompressOptions(["fp16"], 4096, "gaussian", repeats=1))


def test_wrong_kernel_raises_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = host.decode

    def wrong(*arguments: Any) -> Iterator[None]:
        yield from right(*arguments)
        arguments[-1].mul_(1.5)

    monkeypatch.setattr(host, "decode", wrong)
    with pytest.raises(HpcsgdError, match="decode is wrong"):
        command.main(CompressOptions(["maxnorm"], 4096, "gaussian", repeats=1))


@pytest.mark.parametrize("name", ["take_snapshot", "accumulate", "apply_correction"])
def test_wrong_model_delta_raises(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = getattr(model_delta, name)

    def wrong(*tensors: Tensor) -> None:
        right(*tensors)
        tensors[-1][: len(tensors[-1]) // 2].add_(1)

    monkeypatch.setattr(model_delta, name, wrong)
    with pytest.raises(HpcsgdError, match="merge is wrong"):
        command.main(CompressOptions(["maxnorm"], 4096, "gaussian", repeats=1))


def test_check_detects_bias_below_the_noise() -> None:
    with World(device="cpu") as world:
        generator = torch.Generator().manual_seed(3)
        problem = AveragingProblem(world, MPI.COMM_WORLD, [torch.full((200, 200), 1.0 + world.rank)], 4.0)
        noise = torch.randn(problem.flat.shape, generator=generator)
        noisy = problem.exact.float() * (1 + 2 * noise)
        assert problem.check("noise", noisy, 3.0) == pytest.approx(2, rel=0.05)
        for wrong in (1.5 * noisy, noisy * torch.nan):
            with pytest.raises(HpcsgdError, match="noise is wrong"):
                problem.check("noise", wrong, 9.0)
        with pytest.raises(HpcsgdError, match="noise is wrong"):
            problem.check("noise", noisy, 1.0)
        if world.size > 1:
            noisy[-1] += world.rank
            with pytest.raises(HpcsgdError, match=r"(?s)noise is wrong.*same on all ranks"):
                problem.check("noise", noisy, 3.0)


def test_error_bounds_follow_the_scheme() -> None:
    of = {
        spec: error_bound(build(spec), 1000) for spec in ("fp16", "maxnorm:bits=8", "maxnorm:bits=4", "bf16")
    }
    assert (
        of["fp16"] < of["bf16"] < of["maxnorm:bits=4"] < 0.5 and of["maxnorm:bits=8"] < of["maxnorm:bits=4"]
    )
    assert error_bound(build("hadamard+maxnorm"), 1000) == of["maxnorm:bits=4"]
    biased = [error_bound(build(s), 1000) for s in ("topk", "signsgd", "powersgd", "ef+randk")]
    assert biased == [float("inf")] * 4
    assert error_bound(build("randk"), 1000) < error_bound(build("randk-maxnorm"), 1000) < 10
    assert error_bound(build("randk:k=10"), 1000) > error_bound(build("randk:k=100"), 1000)


def test_fake_buckets_hold_every_tensor_once() -> None:
    flat = torch.zeros(20 * 2**20)
    tensors = [(i * 2**20, (1024, 1000)) for i in range(20)]
    cut = ddp_hooks._buckets(flat, tensors)
    assert [bucket.is_last() for bucket in cut] == [False] * (len(cut) - 1) + [True]
    assert len(cut) > 1 and sum(len(bucket.gradients()) for bucket in cut) == 20
    assert sum(bucket.buffer().numel() for bucket in cut) == flat.numel()
    for bucket in cut:
        bucket.buffer().add_(1)
    assert bool((flat == 1).all())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_gpu_raises() -> None:
    with pytest.raises(BadOption, match="expected a GPU that torch can use"):
        command.main(CompressOptions(device="cuda"))


def test_a_scheme_that_is_always_measured_is_refused() -> None:
    with pytest.raises(BadOption, match="schemes"):
        command.main(CompressOptions(["none"]))


def test_command_parses_specs_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[CompressOptions] = []
    monkeypatch.setattr(command, "main", called.append)
    words = ["bench", "compress", "--schemes", "maxnorm:bits=4,block=64; ef+topk;", "--elements", "11.2M"]
    cli([*words, "--data", "gaussian", "--repeats", "3"], standalone_mode=False)
    cli(["bench", "compress"], standalone_mode=False)
    given = CompressOptions(["maxnorm:bits=4,block=64", "ef+topk"], 11_200_000, "gaussian", repeats=3)
    assert called == [given, CompressOptions()]
    assert len(called[1].schemes) > 10 and called[1].repeats == 5
    with pytest.raises(click.BadParameter, match="such as 65536, 64k"):
        cli(["bench", "compress", "--elements", "many"], standalone_mode=False)
