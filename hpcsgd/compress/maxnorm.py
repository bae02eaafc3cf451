"""QSGD-MaxNorm: codes of b bits on one scale that all ranks share."""

from __future__ import annotations

from hpcsgd.compress.base import Codec, Compressor, Stretch, levels_of
from hpcsgd.compress.packed_quantizer import BLOCK, LaneCodec, Norm, ScaleOf, Scaling


class QSGDMaxNorm(Compressor):
    """Stochastic rounding to 2**(bits-1) - 1 levels on either side of zero; unbiased.

    W is the maximum over all ranks of a norm; an element x becomes the code sign(x) * (floor(|x| s / W) +
    Bernoulli(fraction)); the mean is W / (s n) times the sum of the codes. Vineeth S., arXiv 2109.12497.
    Ours: one norm a block, sent as bfloat16, and codes packed in lanes, so that 4 bits of 4 ranks take 6.4
    bits an element on the wire.

    Parameters
    ----------
    bits
        Of a code, 2 to 16. Default 4.
    scale
        What shares a norm: a "block" of consecutive elements (default), a "tensor", or a "bucket". With one
        norm a bucket the few large elements of real gradients leave the others one or two levels.
    block
        Elements of a block, at most, rounded up to a multiple of 4. Default 384.
    norm
        "max" (default), or "euclidean".
    """

    def __init__(
        self, bits: int = 4, scale: ScaleOf = "block", block: int = BLOCK, norm: Norm = "max"
    ) -> None:
        self.bits, self.scaling = bits, Scaling(scale, block, norm)
        self.scaling.check()
        self.levels = levels_of(bits)

    def options(self) -> dict[str, object]:
        return {"bits": self.bits, **vars(self.scaling)}

    def codec(self, stretch: Stretch) -> Codec:
        return LaneCodec(stretch, (self.levels,), self.scaling)
