"""Error feedback: the compression error is added to the next gradient."""

from __future__ import annotations

from hpcsgd.compress.base import Codec, Compressor, Segment


class ErrorFeedback(Compressor):
    """Wraps a scheme with error feedback: residual e <- (g + e) - decode(encode(g + e)).

    The residual is float32, one number an element, and part of the checkpoint. Schemes read and write it in
    the pass in which they quantise. Seide et al. 2014; Karimireddy et al., arXiv 1901.09847.

    Parameters
    ----------
    inner
        The scheme.
    """

    feedback = True

    def __init__(self, inner: Compressor) -> None:
        self.inner = inner

    @property
    def needs_whole_tensors(self) -> bool:  # type: ignore[override]
        return self.inner.needs_whole_tensors

    def options(self) -> dict[str, object]:
        return {"inner": str(self.inner)}

    def codec(self, segment: Segment) -> Codec:
        return self.inner.codec(segment)
