"""QSGD-MaxNorm with several scales: small elements are rounded on a finer scale."""

from __future__ import annotations

from hpcsgd.compress.base import Bits, Codec, Compressor, Segment, levels_of
from hpcsgd.compress.packed_quantizer import BLOCK, BlockSize, Norm, PackedQuantizer, ScaleOf, Scaling
from hpcsgd.errors import BadOption
from hpcsgd.registry import checked


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

    @checked
    def __init__(
        self,
        bits: tuple[Bits, ...] = (4, 8),
        scale: ScaleOf = "block",
        block: BlockSize = BLOCK,
        norm: Norm = "max",
    ) -> None:
        if len(bits) < 2 or list(bits) != sorted(set(bits)):
            raise BadOption(
                "option bits, the bits of each scale, is invalid",
                expected="two or more, ascending, such as (4, 8)",
                got=bits,
            )
        self.bits, self.scaling = bits, Scaling(scale, block, norm)
        self.levels = tuple(levels_of(b) for b in bits)

    def options(self) -> dict[str, object]:
        return {"bits": self.bits, **vars(self.scaling)}

    def codec(self, segment: Segment) -> Codec:
        return PackedQuantizer(segment, self.levels, self.scaling)
