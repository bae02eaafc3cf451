"""Error feedback: the compression error is added to the next gradient."""

from __future__ import annotations

from hpcsgd.compress.base import Codec, Segment, Wrapper


class ErrorFeedback(Wrapper):
    """Wraps a scheme with error feedback: residual e <- (g + e) - decode(encode(g + e)).

    The residual is float32, one number an element, and part of the checkpoint. Schemes read and write it in
    the pass in which they quantise. Seide et al. 2014; Karimireddy et al., arXiv 1901.09847.

    Parameters
    ----------
    inner
        The scheme.
    """

    feedback = True

    @property
    def needs_whole_tensors(self) -> bool:  # type: ignore[override]
        return self.inner.needs_whole_tensors

    def codec(self, segment: Segment) -> Codec:
        return self.inner.codec(segment)
