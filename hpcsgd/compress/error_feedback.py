"""Error feedback: what a scheme did not send is added to the next gradient."""

from __future__ import annotations

from hpcsgd.compress.base import Codec, Compressor, Stretch


class ErrorFeedback(Compressor):
    """e becomes (g + e) - decode(own code): nothing is lost, only late.

    The memory is float32, one number an element, and part of the checkpoint. Schemes read it and write
    it in the pass in which they quantise. Seide et al. 2014; Karimireddy et al., arXiv 1901.09847.

    Parameters
    ----------
    inner
        Any scheme.
    """

    feedback = True

    def __init__(self, inner: Compressor) -> None:
        self.inner = inner

    @property
    def whole(self) -> bool:  # type: ignore[override]
        return self.inner.whole

    def options(self) -> dict[str, object]:
        return {"inner": str(self.inner)}

    def codec(self, stretch: Stretch) -> Codec:
        return self.inner.codec(stretch)
