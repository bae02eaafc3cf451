"""The check that inputs are images, and large enough for a model."""

from __future__ import annotations

from hpcsgd.errors import BadOption


def check_image(shape: tuple[int, ...], model: str, smallest: int = 1) -> tuple[int, int, int]:
    """Return channels, height and width of a model's input, after a check for the smallest height and width.

    Raises
    ------
    BadOption
        Another number of dimensions, or a smaller image.
    """
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise BadOption(
            f"{model} cannot take inputs of shape {shape}",
            expected=f"(channels, height, width) of at least {smallest} by {smallest} pixels",
            do="use larger images, or --model 2nn, which accepts inputs of any shape",
        )
    channels, height, width = shape
    return channels, height, width
