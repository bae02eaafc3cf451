"""Walsh-Hadamard butterflies between rows of 16 float32, held in vector registers.

numba's loops cannot express that the rows of an array do not overlap, and check it at every row. This
intrinsic emits LLVM vectors instead, which every architecture maps to its registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, types

from hpcsgd.kernels.codec.spec import ROTATION_COLUMNS

intrinsic: Any = extending.intrinsic

#: Rows that are transformed in one call.
MAX_ROWS = 32

_ROW = ir.VectorType(ir.FloatType(), ROTATION_COLUMNS)


def _butterflies(builder: Any, rows: list[Any]) -> list[Any]:
    """Combine neighbouring rows first, the two halves last."""
    h = 1
    while h < len(rows):
        pairs = [(rows[k & ~h], rows[k | h]) for k in range(len(rows))]
        rows = [(builder.fsub if k & h else builder.fadd)(*pair) for k, pair in enumerate(pairs)]
        h *= 2
    return rows


@intrinsic  # type: ignore[untyped-decorator]
def transform(_: Any, count: Any, values: Any, start: Any, step: Any) -> Any:
    """Transform `count` rows, a power of two up to `MAX_ROWS`, in place.

    The rows start at element `start` of `values` and are `step` elements apart.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count, values, start, step = arguments
        data = context.make_array(signature.args[1])(context, builder, values).data

        def row_pointer(k: int) -> Any:
            i = builder.add(start, builder.mul(step, step.type(k)))
            return builder.bitcast(builder.gep(data, [i]), _ROW.as_pointer())

        end = builder.append_basic_block("end")
        select = builder.switch(count, end)
        for size in (2**k for k in range(1, MAX_ROWS.bit_length())):
            block = builder.append_basic_block(f"rows_{size}")
            select.add_case(count.type(size), block)
            builder.position_at_end(block)
            pointers = [row_pointer(k) for k in range(size)]
            rows = _butterflies(builder, [builder.load(pointer, align=4) for pointer in pointers])
            for row, pointer in zip(rows, pointers, strict=True):
                builder.store(row, pointer, align=4)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(types.int64, values, types.int64, types.int64), emit
