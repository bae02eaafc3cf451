"""Specification of the codec kernels, which host and device implement with identical bits.

**Rows and tiles.** A segment of gradient is divided into rows of `row` consecutive elements, and `lanes`
rows form a tile of `row` words: word j of a tile holds element j of each of its rows, row l in lane l.
Every inner loop thus runs over consecutive memory with one scale and one shift.

**Lanes.** A code lies in [-levels, levels] and is stored with an offset of `levels`. A lane is wide enough
for the sum over all terms, so one addition of unsigned words adds all lanes without a carry between them.

**Scales.** A row's norm is transmitted as the upper 16 bits of a float32 (bfloat16), rounded up. A code is
x * pre * inverse, stochastically rounded, where pre is the power of two that scales the norm to about 1, so
that nothing under- or overflows, from the smallest denormal to the largest number.

**Random numbers.** 24 bits of a hash of the element's index under a key of 64 bits: stateless, and equal in
any order of evaluation, on any device, and after a restart.

**Euclidean norms.** Squares are summed in float64 in 128 partial sums, element j of a row in sum j % 128;
then, for h = 64, 32, ..., 1, sum k + h is added to sum k < h. The root is rounded to float32.

**Rotation.** From the start of a segment on, tiles of `ROTATION_ROWS` rows of `ROTATION_COLUMNS` consecutive
elements; then, while two rows are left, a tile of the largest power of two of rows that fits. The input is
multiplied by the float32 nearest to 1 / sqrt(rows). Then, for h = 1, 2, 4, ..., rows r and r + h are
replaced by their sum and difference. The sign of an element is the highest bit of its hash, applied before
the transform, or after it in the inverse. The rest after the last tile has signs only.

**Coordinates.** To sample k of d elements, interval i is [i * d // k, (i + 1) * d // k), and the sampled
element has the offset hash(i) * length // 2^32 in it.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The hash: h = (i ^ key0) * A; h ^= h >> 16; h += key1; h *= B; h ^= h >> 15; h *= C; h ^= h >> 15.
HASH_A, HASH_B, HASH_C = 0x9E3779B1, 0x21F0AAAD, 0x735A2D97
RANDOM_BITS = 24
#: Norms from here on are not finite (the bits of infinity in bfloat16); the largest finite norm.
NOT_FINITE, LARGEST_NORM = 0x7F80, 0x7F7F
#: The elements of a row are a multiple of this: 16 bytes of float32.
ROW_ALIGNMENT = 4
#: Partial sums of the squares of a row.
SQUARE_SUMS = 128
#: A tile of the rotation: consecutive elements of a row, and the maximum number of rows.
ROTATION_COLUMNS, ROTATION_ROWS = 16, 1024

_MASK = 2**64 - 1


@dataclass(frozen=True)
class Lanes:
    """Division of a word into lanes, one code in each."""

    width: int  # bits of a lane
    count: int  # lanes of a word
    word: int  # bits of a word: 32 or 64

    @property
    def bits_per_element(self) -> float:
        return self.word / self.count


def lanes_for(levels: int, terms: int) -> Lanes:
    """Return the lanes in which codes of [-levels, levels] can be summed over `terms` ranks.

    Raises
    ------
    ValueError
        A lane would need more than 32 bits, which saves nothing over float32.
    """
    width = (2 * levels * terms).bit_length()
    if width > 32:
        raise ValueError(
            f"{levels} levels of {terms} ranks need {width} bits a code, which is more than a float32 has"
        )
    # The word with fewer unused bits; if equal the shorter, of which a vector register holds more.
    word = min((32, 64), key=lambda bits: bits / (bits // width))
    return Lanes(width, word // width, word)


@dataclass(frozen=True)
class Tiling:
    """Division of a segment into rows and tiles."""

    numel: int
    lanes: int  # rows of a tile
    row: int  # elements of a row; the last row may have fewer
    tiles: int

    @staticmethod
    def of(numel: int, lanes: int, longest_row: int) -> Tiling:
        """Return rows of at most `longest_row` elements, as equal as their alignment allows."""
        tiles = -(-numel // (lanes * longest_row))
        row = -(-numel // max(1, lanes * tiles))
        return Tiling(numel, lanes, -(-row // ROW_ALIGNMENT) * ROW_ALIGNMENT, tiles)

    @property
    def rows(self) -> int:
        return -(-self.numel // self.row) if self.numel else 0

    @property
    def words(self) -> int:
        return self.tiles * self.row

    def elements(self, first_tile: int, last_tile: int) -> slice:
        """Return the elements of a range of tiles."""
        size = self.lanes * self.row
        return slice(min(first_tile * size, self.numel), min(last_tile * size, self.numel))


def key(*parts: int) -> tuple[int, int]:
    """Return the 64-bit key of a stream of random numbers as two words; it depends on every part."""
    state = 0
    for part in parts:
        state = _mix((state + part + 0x9E3779B97F4A7C15) & _MASK)
    return state & 0xFFFFFFFF, state >> 32


def _mix(z: int) -> int:
    """Apply the finaliser of SplitMix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def header() -> str:
    """Return the constants as C preprocessor definitions for the `.cu` files."""
    constants = {
        "HASH_A": HASH_A,
        "HASH_B": HASH_B,
        "HASH_C": HASH_C,
        "RANDOM_BITS": RANDOM_BITS,
        "NOT_FINITE": NOT_FINITE,
        "LARGEST_NORM": LARGEST_NORM,
        "SQUARE_SUMS": SQUARE_SUMS,
        "ROTATION_COLUMNS": ROTATION_COLUMNS,
        "ROTATION_ROWS": ROTATION_ROWS,
    }
    return "".join(f"#define {name} {value}u\n" for name, value in constants.items())
