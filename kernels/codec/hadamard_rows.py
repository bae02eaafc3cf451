"""Walsh-Hadamard butterflies between rows of 16 float32, held in vector registers.

numba's loops cannot say that the rows of an array do not overlap, and test it at every row; this intrinsic
emits LLVM's vectors instead, which every architecture maps to the registers it has.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, types

from hpcsgd.kernels.codec.spec import ROTATION_COLUMNS

intrinsic: Any = extending.intrinsic

#: Rows that are transformed at once.
LARGEST = 32

_ROW = ir.VectorType(ir.FloatType(), ROTATION_COLUMNS)


def _butterflies(builder: Any, rows: list[Any]) -> list[Any]:
    """Between neighbours first, between the halves last."""
    h = 1
    while h < len(rows):
        pairs = [(rows[k & ~h], rows[k | h]) for k in range(len(rows))]
        rows = [(builder.fsub if k & h else builder.fadd)(*pair) for k, pair in enumerate(pairs)]
        h *= 2
    return rows


@intrinsic  # type: ignore[untyped-decorator]
def transform(_: Any, count: Any, values: Any, start: Any, step: Any) -> Any:
    """Transform `count` rows, a power of two up to 32, in place.

    The rows start at element `start` of `values` and lie `step` elements apart.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count, values, start, step = arguments
        data = context.make_array(signature.args[1])(context, builder, values).data

        def place(k: int) -> Any:
            i = builder.add(start, builder.mul(step, step.type(k)))
            return builder.bitcast(builder.gep(data, [i]), _ROW.as_pointer())

        end = builder.append_basic_block("end")
        select = builder.switch(count, end)
        for size in (2**k for k in range(1, LARGEST.bit_length())):
            block = builder.append_basic_block(f"rows_{size}")
            select.add_case(count.type(size), block)
            builder.position_at_end(block)
            places = [place(k) for k in range(size)]
            rows = _butterflies(builder, [builder.load(each, align=4) for each in places])
            for row, each in zip(rows, places, strict=True):
                builder.store(row, each, align=4)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(types.int64, values, types.int64, types.int64), emit
