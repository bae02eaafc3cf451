"""The check that an input is an image, and large enough."""

from __future__ import annotations

from hpcsgd.errors import BadOption


def image(shape: tuple[int, ...], model: str, least: int = 1) -> tuple[int, int, int]:
    """Channels, height and width of an input.

    Parameters
    ----------
    shape
        Of one input.
    model
        Named in the error.
    least
        Pixels that height and width need.

    Raises
    ------
    BadOption
        Another number of dimensions, or a smaller image.
    """
    if len(shape) != 3 or min(shape[1:]) < least:
        raise BadOption(
            f"{model} cannot take inputs of shape {shape}",
            expected=f"(channels, height, width) of at least {least} by {least} pixels",
            do="take larger images, or the model 2nn, which takes inputs of any shape",
        )
    channels, height, width = shape
    return channels, height, width
