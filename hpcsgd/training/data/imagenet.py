"""ImageNet, from folders of images that are decoded on demand."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.errors import HpcsgdError
from hpcsgd.registry import Within, checked
from hpcsgd.training.data.base import Data
from hpcsgd.training.data.rng_streams import preserve_python_random

_MEAN = torch.tensor([0.485, 0.456, 0.406], device="cpu").view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225], device="cpu").view(3, 1, 1)
_BILINEAR = 2  # PIL.Image.Resampling.BILINEAR, without importing PIL for it
_FLIP = 0  # PIL.Image.Transpose.FLIP_LEFT_RIGHT
_SIZE = 224


@checked
def imagenet(path: Path = Path("data/imagenet"), workers: Annotated[int, Within(1, 1024)] = 4) -> Data:
    """Images of 224 by 224 pixels, from folders ``train`` and ``val`` with a folder for each class.

    A training image is a random crop of 8 to 100 % of the area, mirrored half of the time; a test
    image is the centre, after its shorter side is scaled to 256 pixels. Needs torchvision.

    Parameters
    ----------
    path
        Folder of ``train`` and ``val``. Default ``data/imagenet``.
    workers
        Decoding threads of each rank. Default 4.

    Raises
    ------
    HpcsgdError
        torchvision or a folder is missing, or the two folders differ in their classes.

    Notes
    -----
    Russakovsky et al., ImageNet large scale visual recognition challenge, 2015. Crops: Szegedy et
    al., Going deeper with convolutions, 2015.
    """
    train, val = (_folder(path / name) for name in ("train", "val"))
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise HpcsgdError(
            f"{path / 'train'} and {path / 'val'} differ in their classes",
            got=f"only in one of them: {', '.join(odd[:5])}",
            do="give val the same folders as train, one for each class",
        )
    pool = ThreadPoolExecutor(workers, "hpcsgd-decode")
    sources = ImageSource(train, pool), ImageSource(val, pool)
    shape = (3, _SIZE, _SIZE)
    return Data(*sources, kind="classification", shape=shape, classes=len(train.classes))


class ImageSource:
    """A source of image files, a torchvision ``ImageFolder``, decoded in parallel by a pool of threads."""

    def __init__(self, folder: Any, pool: ThreadPoolExecutor) -> None:
        self._files = [file for file, _ in folder.samples]
        self._open = folder.loader
        self._pool = pool
        self.labels = torch.tensor(folder.targets, device="cpu")

    def __len__(self) -> int:
        return len(self._files)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return images, (n, 3, 224, 224) float32, and labels; with a generator, random crops."""
        uniform = _uniform_numbers(len(indices), generator)
        images = list(self._pool.map(self._decode, indices.tolist(), uniform))
        return torch.stack(images), self.labels[indices]

    def _decode(self, index: int, uniform: Tensor | None) -> Tensor:
        try:
            image = self._open(self._files[index])
        except OSError as error:
            do = "replace the file, or remove it from its folder"
            raise HpcsgdError(f"cannot decode {self._files[index]}", got=error, do=do) from error
        image = _center(image) if uniform is None else _random_crop(image, uniform)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return (pixels / 255 - _MEAN) / _STD


def crop_box(width: int, height: int, uniform: Tensor) -> tuple[int, int, int, int]:
    """Return a random box in an image: 8 to 100 % of the area, aspect 3:4 to 4:3.

    Parameters
    ----------
    width, height
        Size of the image, in pixels.
    uniform
        Uniform numbers in [0, 1), (attempts, 4): area, aspect, and the corner's two coordinates. The
        first attempt inside the image is used; if there is none, the largest centred box of an allowed
        aspect.

    Returns
    -------
    left, top, right, bottom
    """
    for area, aspect, x, y in uniform.tolist():
        target = width * height * (0.08 + 0.92 * area)
        ratio = math.exp((2 * aspect - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _uniform_numbers(count: int, generator: torch.Generator | None) -> Tensor | list[None]:
    """Return the numbers of ten attempts at a crop for each image, and one more for mirroring."""
    return torch.rand(count, 41, generator=generator, device="cpu") if generator else [None] * count


def _random_crop(image: Any, uniform: Tensor) -> Any:
    width, height = image.size
    image = image.crop(crop_box(width, height, uniform[:40].view(10, 4)))
    image = image.resize((_SIZE, _SIZE), _BILINEAR)
    return image.transpose(_FLIP) if uniform[40] < 0.5 else image


def _center(image: Any) -> Any:
    width, height = (256 * side // min(image.size) for side in image.size)
    left, top = (width - _SIZE) // 2, (height - _SIZE) // 2
    image = image.resize((width, height), _BILINEAR)
    return image.crop((left, top, left + _SIZE, top + _SIZE))


def _folder(path: Path) -> Any:
    try:
        with preserve_python_random():
            from torchvision.datasets import ImageFolder
    except (ImportError, RuntimeError) as error:
        do = "install the version of torchvision that fits this torch"
        raise HpcsgdError("imagenet needs torchvision", got=error, do=do) from error
    try:
        return ImageFolder(str(path))
    except FileNotFoundError as error:
        raise HpcsgdError(
            f"no images for imagenet in {path.absolute()}",
            expected="folders train and val, with a folder of images for each class",
            got=error,
            do="download them from the ImageNet page (ILSVRC2012), and set --data imagenet:path=FOLDER",
        ) from error
