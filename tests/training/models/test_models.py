from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpcsgd.errors import BadOption
from hpcsgd.training.data.base import Data
from hpcsgd.training.data.in_memory import TensorSource
from hpcsgd.training.models import MODELS, build

NOTHING = TensorSource(torch.zeros(0), torch.zeros(0))
IMAGE_MODELS = ["lenet", "vgg11", "vgg16", "resnet18", "resnet20", "resnet50"]


def images(*shape: int, classes: int = 10) -> Data:
    return Data(NOTHING, NOTHING, "classification", shape, classes)


def tokens(context: int = 16, vocabulary: int = 50) -> Data:
    return Data(NOTHING, NOTHING, "language", (context,), vocabulary)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 9, 17)])
@pytest.mark.parametrize("name", ["logistic", "2nn", *IMAGE_MODELS])
def test_classifiers_give_logits(name: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = build(name, images(*shape, classes=7))
        assert model(torch.empty(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_convolutional_models_take_large_images(name: str) -> None:
    with torch.device("meta"):
        model = build(name, images(3, 224, 224))
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 10)


@pytest.mark.parametrize("name", ["logistic", "2nn"])
def test_dense_models_take_any_shape(name: str) -> None:
    assert build(name, images(5)).forward(torch.zeros(3, 5)).shape == (3, 10)


@pytest.mark.parametrize(
    ("name", "data", "count"),
    [
        ("logistic", images(1, 28, 28), 7_850),
        ("2nn", images(1, 28, 28), 199_210),
        ("lenet", images(1, 28, 28), 61_706),
        ("lenet", images(1, 32, 32), 61_706),
        ("vgg11", images(3, 32, 32), 9_231_114),
        ("vgg16", images(3, 32, 32), 14_728_266),
        ("resnet18", images(3, 32, 32), 11_173_962),
        ("resnet18", images(3, 224, 224, classes=1000), 11_689_512),
        ("resnet20", images(3, 32, 32), 272_474),
        ("resnet50", images(3, 32, 32), 23_520_842),
        ("resnet50", images(3, 224, 224, classes=1000), 25_557_032),
    ],
)
def test_published_parameter_counts(name: str, data: Data, count: int) -> None:
    with torch.device("meta"):
        assert parameters(build(name, data)) == count


@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_reach_every_parameter(name: str) -> None:
    data = tokens() if name == "gpt" else images(3, 16, 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name, data)
        x = torch.randint(50, (8, 16)) if name == "gpt" else torch.randn(8, 3, 16, 16)
    logits = model(x).flatten(0, -2)
    F.cross_entropy(logits, torch.arange(len(logits)) % 10).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
        assert parameter.ndim == 1 or bool(parameter.grad.any()), key


def test_the_strides_of_the_stems() -> None:
    for shape, pixels in (((3, 32, 32), 4), ((3, 63, 63), 8), ((3, 64, 64), 2), ((3, 224, 224), 7)):
        with torch.device("meta"):
            model = build("resnet18", images(*shape))
            assert isinstance(model, nn.Sequential)
            assert model[:-3](torch.empty(1, *shape)).shape == (1, 512, pixels, pixels)


def test_gpt_shapes_and_count() -> None:
    model = build("gpt:layers=3,heads=2,width=32", tokens(context=24, vocabulary=41))
    assert model(torch.zeros(2, 24, dtype=torch.long)).shape == (2, 24, 41)
    assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 41)
    norms, matrices, biases = 4 * 32, 12 * 32 * 32, (3 + 1 + 4 + 1) * 32
    assert parameters(model) == 41 * 32 + 24 * 32 + 3 * (norms + matrices + biases) + 2 * 32


def test_gpt_sees_no_later_token_and_every_earlier_one() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build("gpt", tokens())
        text = torch.randint(50, (1, 16))
    changed = text.clone()
    changed[0, 9] = (text[0, 9] + 1) % 50
    with torch.no_grad():
        difference = (model(text) - model(changed)).abs().amax(-1)[0]
    assert bool((difference[:9] == 0).all()) and bool((difference[9:] > 0).all())


def test_gpt_starts_near_the_uniform_distribution() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = build("gpt", tokens(vocabulary=100))
        text = torch.randint(100, (4, 17))
    loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
    assert abs(loss.item() - math.log(100)) < 0.2


def test_gpt_refuses_an_input_beyond_its_context() -> None:
    with pytest.raises(BadOption, match="at most 16 tokens"):
        build("gpt", tokens())(torch.zeros(1, 17, dtype=torch.long))


def test_weights_are_a_function_of_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build("lenet", images(1, 8, 8))
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_bad_specs_list_what_is_valid() -> None:
    for spec, data, message in [
        ("resnet19", images(3, 32, 32), "resnet18, resnet20"),
        (
            "gpt",
            images(3, 32, 32),
            "model 'gpt' does not fit the data: expected a classification model: logistic, ",
        ),
        ("lenet", tokens(), "expected a language model: gpt; or data"),
        ("2nn:depth=3", images(4), "width=int"),
        ("2nn:shape=3", images(4), "set by hpcsgd"),
        ("resnet18:width", images(3, 32, 32), "key=value"),
        ("gpt:width=30,heads=4", tokens(), "a multiple"),
        ("lenet", images(1, 3, 8), "at least 4 by 4"),
        ("vgg16", images(3, 1, 1), "at least 2 by 2"),
        ("resnet18", images(64), "channels, height, width"),
    ]:
        with pytest.raises(BadOption, match=message):
            build(spec, data)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of the user's own in the working directory, which is not on the path."""
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets" / "nets.py").write_text(
        "import torch\n"
        "def make(classes: int, width: int = 4):\n"
        "    hidden = torch.nn.Linear(6, width)\n"
        "    return torch.nn.Sequential(hidden, torch.nn.Linear(width, classes))\n"
        "class Plain(torch.nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(6, 2)\n"
        "def number(): return 3\n"
        "VALUE = 3\n"
    )
    (tmp_path / "own_nets" / "broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield "own_nets"
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_nets"]:
        del sys.modules[name]


def test_a_callable_of_the_users_own(own: str) -> None:
    data = images(6, classes=3)
    assert build(f"{own}.nets:make", data)(torch.zeros(2, 6)).shape == (2, 3)
    assert parameters(build(f"{own}.nets:make:width=5", data)) == 6 * 5 + 5 + 5 * 3 + 3
    assert build(f"{own}.nets:Plain", data)(torch.zeros(2, 6)).shape == (2, 2)


def test_a_callable_that_is_none(own: str) -> None:
    for spec, message in [
        (f"{own}.nets:absent", "no callable 'absent'"),
        (f"{own}.nets:VALUE", "no callable 'VALUE'"),
        (f"{own}.nets:number", "returned no model"),
        (f"{own}.nets:make:depth=5", "width=int"),
        (f"{own}.none:make", "there is no module"),
        ("resnet:make", "resnet18, resnet20"),
    ]:
        with pytest.raises(BadOption, match=message):
            build(spec, images(6))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        build(f"{own}.broken:make", images(6))
