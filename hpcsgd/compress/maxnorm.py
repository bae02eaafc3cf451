"""QSGD-MaxNorm: codes of b bits on one scale shared by all ranks."""

from __future__ import annotations

from hpcsgd.compress.base import Bits, Codec, Compressor, Segment, levels_of
from hpcsgd.compress.packed_quantizer import BLOCK, BlockSize, Norm, PackedQuantizer, ScaleOf, Scaling
from hpcsgd.registry import checked


class QSGDMaxNorm(Compressor):
    """Stochastic rounding to 2**(bits-1) - 1 levels on either side of zero; unbiased.

    W is the maximum over all ranks of a norm; an element x becomes the code sign(x) * (floor(|x| s / W) +
    Bernoulli(fraction)); the mean over n ranks is W / (s n) times the sum of the codes. Vineeth S., arXiv
    2109.12497. Our additions: one norm a block, sent as bfloat16, and codes packed in lanes, so that 4 bits
    on 4 ranks take 6.4 bits an element on the wire.

    Parameters
    ----------
    bits
        Bits of a code, 2 to 16. Default 4.
    scale
        Elements that share a norm: a "block" of consecutive elements (default), a "tensor", or a "bucket".
        With one norm a bucket, the few large elements of real gradients leave the others one or two levels.
    block
        Maximum number of elements of a block, rounded up to a multiple of 4. Default 384.
    norm
        "max" (default), or "euclidean".
    """

    @checked
    def __init__(
        self, bits: Bits = 4, scale: ScaleOf = "block", block: BlockSize = BLOCK, norm: Norm = "max"
    ) -> None:
        self.bits, self.scaling = bits, Scaling(scale, block, norm)
        self.levels = levels_of(bits)

    def options(self) -> dict[str, object]:
        return {"bits": self.bits, **vars(self.scaling)}

    def codec(self, segment: Segment) -> Codec:
        return PackedQuantizer(segment, (self.levels,), self.scaling)
