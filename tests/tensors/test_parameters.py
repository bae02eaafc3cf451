"""Parameters in a tensor group stay those that are trained, wherever their memory is moved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hpcsgd import BadOption, HpcsgdError
from hpcsgd.tensors.memory import overlapping
from hpcsgd.tensors.parameters import Parameters


def model() -> nn.Module:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4))
    return net.to(memory_format=torch.channels_last)


def named(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(net.named_parameters())


def values(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def in_group(parameters: Parameters) -> torch.Tensor:
    """The values in the buffer, by its own views."""
    found = {n: v for b in parameters.group for n, v in zip(b.names, b.views, strict=True)}
    return torch.cat([found[name].flatten() for name, _ in parameters.templates])


def vector(net: nn.Module) -> None:
    nn.utils.vector_to_parameters(values(net) + 1, net.parameters())


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "double and float": lambda net: net.double().float(),
    "memory format": lambda net: net.to(memory_format=torch.contiguous_format),
    "vector": vector,
    "data": lambda net: setattr(net[1].weight, "data", torch.ones(4, 4)),
    "shared": lambda net: net.share_memory(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moved_parameters_are_taken_in(alone: Any, move: Callable[[nn.Module], Any]) -> None:
    net = model()
    parameters = Parameters(alone, named(net))
    strides = [p.stride() for p in net.parameters()]
    for _ in range(2):
        move(net)
        expected = values(net)
        parameters.adopt()
        assert torch.equal(values(net), expected) and torch.equal(in_group(parameters), expected)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1)
        assert torch.equal(in_group(parameters), expected + 1), "the group is what is trained"
    assert [p.stride() for p in net.parameters()] == strides


def test_the_move_of_a_parameter_within_an_evaluation_is_undone(alone: Any) -> None:
    net = model()
    parameters = Parameters(alone, named(net))
    saved, expected = parameters.copy(), values(net)
    net.half()
    parameters.restore(saved)
    assert torch.equal(values(net), expected) and torch.equal(in_group(parameters), expected)


def tie(net: nn.Module) -> None:
    net[2].weight.data = net[1].weight.data


def tie_elsewhere(net: nn.Module) -> None:
    net[2].weight.data = net[1].weight.data = torch.zeros(4, 4)


CHANGES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "dtype": (
        lambda net: net.double(),
        r"0\.weight has(.|\n)*float32 of shape(.|\n)*float64(.|\n)*before Run",
    ),
    "shape": (lambda net: setattr(net[1].weight, "data", torch.ones(4, 2)), r"1\.weight has(.|\n)*\(4, 2\)"),
    "tie": (tie, r"2\.weight has(.|\n)*the memory of 1\.weight(.|\n)*before Run"),
    "tie elsewhere": (tie_elsewhere, r"2\.weight has(.|\n)*the memory of 1\.weight(.|\n)*before Run"),
}


@pytest.mark.parametrize(("change", "match"), CHANGES.values(), ids=CHANGES)
def test_what_cannot_be_taken_in_is_named(alone: Any, change: Callable[[nn.Module], Any], match: str) -> None:
    net = model()
    parameters = Parameters(alone, named(net))
    change(net)
    with pytest.raises(HpcsgdError, match=match):
        parameters.adopt()


@pytest.mark.parametrize("change", [change for change, _ in CHANGES.values()], ids=CHANGES)
def test_where_no_other_model_is_all_may_change(alone: Any, change: Callable[[nn.Module], Any]) -> None:
    net, plain = model(), model()
    parameters = Parameters(alone, named(net), alone=True)
    for each in (net, plain):
        change(each)
    for end in (parameters.adopt, parameters.release):
        end()
        for each in (net, plain):
            for parameter in each.parameters():
                parameter.data += 1
        assert all(map(torch.equal, net.parameters(), plain.parameters()))


def test_parameters_tied_by_storage_stay_tied(alone: Any) -> None:
    net = model()
    tie(net)
    parameters = Parameters(alone, named(net), copies=2)
    assert "2.weight" not in parameters.group.views
    for act in (lambda: parameters.select(1), lambda: net.double().float(), parameters.release):
        act()
        if act is not parameters.release:
            parameters.adopt()
        with torch.no_grad():
            net[2].weight.add_(1)
        assert torch.equal(net[1].weight, net[2].weight)
    assert net[1].weight.untyped_storage().nbytes() == 64


def test_a_tie_that_is_untied_later_is_an_error(alone: Any) -> None:
    net = model()
    tie(net)
    parameters = Parameters(alone, named(net))
    net[2].weight.data = net[2].weight.data + 1
    with pytest.raises(HpcsgdError, match=r"2\.weight(.|\n)*the memory of 1\.weight"):
        parameters.adopt()


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["overlapping", "expanded"])
def test_parameters_that_share_elements_are_refused_where_models_are_averaged(world: Any, kind: str) -> None:
    memory = torch.zeros(8)
    pair = [memory[:5], memory[3:]] if kind == "overlapping" else [memory[:1].expand(4), torch.zeros(1)]
    pairs = [(name, nn.Parameter(value)) for name, value in zip("ab", pair, strict=True)]
    pairs[0][1].data, pairs[1][1].data = pair
    with pytest.raises(
        BadOption, match="parameters a and b share" if kind == "overlapping" else "parameter a"
    ):
        Parameters(world, pairs)
    assert not Parameters(world, pairs, alone=True).templates, "a single model is left alone"


def test_overlaps_are_of_elements_and_not_of_ranges() -> None:
    memory = torch.zeros(6, 6)
    columns = [(str(i), memory[:, i]) for i in range(6)]
    assert overlapping(columns) is None
    assert overlapping([*columns, ("row", memory[2])]) is not None
    assert overlapping([("a", memory), ("b", memory)]) is None, "the same memory"
    assert overlapping([("a", memory), ("b", memory.t())]) is not None


def test_saved_and_copied_models_share_storage_with_nothing(alone: Any) -> None:
    net = model()
    parameters = Parameters(alone, named(net))
    storages = [p.untyped_storage() for p in net.parameters()]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    assert [s.nbytes() for s in storages] == [p.numel() * 4 for p in net.parameters()]
    file = io.BytesIO()
    torch.save(net[2].state_dict(), file)
    plain = io.BytesIO()
    torch.save(model()[2].state_dict(), plain)
    assert file.tell() == plain.tell() and len(pickle.dumps(net)) == len(pickle.dumps(model()))
    twin, before = copy.deepcopy(net), in_group(parameters)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert torch.equal(in_group(parameters), before) and torch.equal(values(twin), before + 1)


def test_safetensors_saves_all_keys(alone: Any, tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    net = model().to(memory_format=torch.contiguous_format)
    _parameters = Parameters(alone, named(net))
    for save, content in ((safetensors.save_model, net), (safetensors.save_file, net.state_dict())):
        save(content, tmp_path / "model")
        assert set(safetensors.load_file(tmp_path / "model")) == set(net.state_dict())
