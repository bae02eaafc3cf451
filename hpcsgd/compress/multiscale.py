"""QSGD-MaxNorm with several scales: small elements are rounded on a finer scale."""

from __future__ import annotations

from dataclasses import dataclass

from hpcsgd.compress.base import Bits, Codec, Compressor, Segment, levels_of
from hpcsgd.compress.packed_quantizer import BLOCK, BlockSize, Norm, PackedQuantizer, ScaleOf, Scaling
from hpcsgd.errors import BadOption


@dataclass(eq=False, repr=False)
class QSGDMaxNormMultiScale(Compressor):
    """MaxNorm with several scales: each element uses the finest scale on which its code fits; unbiased.

    Of scales with s_1 < s_2 < ... levels, element j uses the largest s_k with |x_j| s_k / W <= s_1 on all
    ranks. The scale is chosen before rounding, so the result is unbiased; the choices are combined by a
    bitwise and of one bit an element for each further scale. Vineeth S., arXiv 2109.12497 (two-scale and
    multi-scale); the packing, and the norm of a block, are our additions.

    Parameters
    ----------
    bits
        Bits of a code at each scale, ascending, 2 to 16; the codes that are sent have those of the first
        scale. Default 4 and 8.
    scale, block, norm
        See `QSGDMaxNorm`.

    Raises
    ------
    BadOption
        `bits` are not two or more, ascending.
    """

    bits: tuple[Bits, ...] = (4, 8)
    scale: ScaleOf = "block"
    block: BlockSize = BLOCK
    norm: Norm = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.bits) < 2 or list(self.bits) != sorted(set(self.bits)):
            raise BadOption(
                "option bits, the bits of each scale, is invalid",
                expected="two or more, ascending, such as (4, 8)",
                got=self.bits,
            )

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels on either side of zero of each scale."""
        return tuple(map(levels_of, self.bits))

    @property
    def scaling(self) -> Scaling:
        """The options of the norms."""
        return Scaling(self.scale, self.block, self.norm)

    def codec(self, segment: Segment) -> Codec:
        return PackedQuantizer(segment, self.levels, self.scaling)
