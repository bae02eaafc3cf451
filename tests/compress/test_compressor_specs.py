"""Specs of compression: parsing, printing, and errors that list valid values."""

from __future__ import annotations

import pytest

from hpcsgd import registry
from hpcsgd.compress import COMPRESSORS, WRAPPERS, build
from hpcsgd.compress.base import Segment
from hpcsgd.compress.error_feedback import ErrorFeedback
from hpcsgd.compress.hadamard import Hadamard
from hpcsgd.compress.maxnorm import QSGDMaxNorm
from hpcsgd.compress.powersgd import PowerSGD
from hpcsgd.compress.randk import GlobalRandKMaxNorm
from hpcsgd.errors import BadOption


@pytest.mark.parametrize("spec", ["none", " none "])
def test_none_is_no_compressor(spec: str) -> None:
    assert build(spec) is None


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_name_builds_a_compressor_that_prints_its_options(name: str) -> None:
    compressor = build(name)
    assert compressor is not None
    text = str(compressor)
    assert text.startswith(type(compressor).__name__)
    assert all(f"{key}={value}" in text for key, value in compressor.options().items())
    assert compressor.codec(Segment(100, 2)).sum_buffers is not None


def test_options_are_those_of_the_spec() -> None:
    options = build("maxnorm:bits=6,scale=tensor,block=128,norm=euclidean").options()
    assert options == {"bits": 6, "scale": "tensor", "block": 128, "norm": "euclidean"}
    assert build("multiscale:bits=2x6x10").options()["bits"] == (2, 6, 10)
    drawn = build("randk-maxnorm:k=50,bits=3")
    assert isinstance(drawn, GlobalRandKMaxNorm) and drawn.options() | {"k": 50, "bits": 3} == drawn.options()
    assert build("powersgd:rank=4").options() == {"rank": 4}


def test_wrappers_stand_before_and_nest() -> None:
    both = build("ef+hadamard+maxnorm:bits=4")
    assert isinstance(both, ErrorFeedback) and isinstance(both.inner, Hadamard)
    assert isinstance(both.inner.inner, QSGDMaxNorm) and both.inner.inner.bits == 4
    assert both.feedback and not both.inner.feedback and not both.needs_whole_tensors
    power = build("ef+powersgd")
    assert power.needs_whole_tensors and power.feedback
    assert build("hadamard+ef+multiscale").feedback


def test_different_compressors_have_different_texts() -> None:
    """Ranks compare the text."""
    texts = [
        "maxnorm", "maxnorm:bits=5", "maxnorm:block=64", "maxnorm:scale=tensor", "maxnorm:norm=euclidean",
        "ef+maxnorm", "hadamard+maxnorm", "ef+hadamard+maxnorm", "multiscale", "randk", "randk:k=3",
        "randk:ratio=0.2", "randk-maxnorm", "randk-maxnorm:bits=5", "topk", "topk:k=3", "powersgd",
        "powersgd:rank=3", "fp16", "bf16",
    ]  # fmt: skip
    assert len({str(build(text)) for text in texts}) == len(texts)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("maxnrom", ["unknown compression scheme 'maxnrom'", *COMPRESSORS]),
        ("fe+maxnorm", ["unknown wrapper", "'fe'", *WRAPPERS]),
        ("ef", ["unknown compression scheme 'ef'"]),
        ("maxnorm:bit=4", ["no option 'bit'", "bits", "scale=block|tensor|bucket", "norm=max|euclidean"]),
        ("maxnorm:bits=x", ["'bits'", "a whole number from 2 to 16"]),
        ("maxnorm:scale=layer", ["block, tensor, bucket"]),
        ("hadamard+powersgd", ["PowerSGD", "cannot be rotated"]),
        ("hadamard+ef+powersgd", ["PowerSGD", "cannot be rotated"]),
        ("", ["name"]),
    ],
)
def test_errors_list_valid_values(spec: str, parts: list[str]) -> None:
    with pytest.raises(BadOption) as error:
        build(spec)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("bits", ["4", "8x4", "4x4"])
def test_scales_are_two_or_more_and_ascend(bits: str) -> None:
    with pytest.raises(BadOption, match="two or more, ascending"):
        build(f"multiscale:bits={bits}")


def test_help_shows_each_scheme_with_its_defaults() -> None:
    rows = {name: (options, summary) for name, options, summary in registry.describe(COMPRESSORS)}
    assert rows["maxnorm"][0] == "bits=4,scale=block,block=384,norm=max"
    assert rows["multiscale"][0].startswith("bits=4x8")
    assert all(summary for _, summary in rows.values())


def test_each_segment_sends_its_share_of_k() -> None:
    compressor = build("randk:k=100")
    codecs = [compressor.codec(Segment(1000, 2, share=share)) for share in (1.0, 0.5, 0.25, 1e-9)]
    assert [codec.sum_buffers[0][0] for codec in codecs] == [100, 50, 25, 1]
    assert PowerSGD(3).codec(Segment(400, 2, tensors=((0, (20, 20)),))).sum_buffers[0][0] == 60
