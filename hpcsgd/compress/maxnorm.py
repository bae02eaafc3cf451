"""QSGD-MaxNorm: codes of b bits on one scale shared by all ranks."""

from __future__ import annotations

from dataclasses import dataclass

from hpcsgd.compress.base import Bits, Codec, Compressor, Segment, levels_of
from hpcsgd.compress.packed_quantizer import BLOCK, BlockSize, Norm, PackedQuantizer, ScaleOf, Scaling


@dataclass(eq=False, repr=False)
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

    bits: Bits = 4
    scale: ScaleOf = "block"
    block: BlockSize = BLOCK
    norm: Norm = "max"

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels on either side of zero."""
        return (levels_of(self.bits),)

    @property
    def scaling(self) -> Scaling:
        """The options of the norms."""
        return Scaling(self.scale, self.block, self.norm)

    def codec(self, segment: Segment) -> Codec:
        return PackedQuantizer(segment, self.levels, self.scaling)
