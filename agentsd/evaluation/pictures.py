"""Reading pictures: folders of them, batches, and whether a file is the picture it should be."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentsd.images import read_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
KEY = "agentsd-eval"


def label(text: dict[str, Any]) -> dict[str, str]:
    """What a picture's file says about it, as PNG text."""
    return {KEY: json.dumps(text, sort_keys=True, ensure_ascii=False)}


def is_finished(path: Path, text: dict[str, Any]) -> bool:
    """Whether a PNG file exists, is complete by its checksums and carries the label of `text`."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            same: bool = image.info.get(KEY) == label(text)[KEY]
            image.verify()
            return same
    except (OSError, SyntaxError, ValueError):
        return False


def list_pictures(folder: Path, per_class: int | None = None, number: int | None = None) -> list[Path]:
    """The pictures below a folder by name: the first `per_class` of each subfolder, the first `number` in all.

    Raises:
        ValueError: there is no such folder, or it holds no picture, or fewer than `number`.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of pictures")
    found: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            found.setdefault(path.parent, []).append(path)
    paths = [path for _, inside in sorted(found.items()) for path in inside[:per_class]]
    if not paths:
        raise ValueError(f"{folder} holds no picture ({', '.join(SUFFIXES)})")
    if number is not None and len(paths) < number:
        raise ValueError(f"{folder} holds {len(paths)} pictures; the protocol takes {number}")
    return paths[:number]


def read_image(path: Path, size: int | None = None, convert: bool = False) -> Tensor:
    """A picture as 3×H×W bytes, its shorter side scaled to `size` pixels and the middle cut out.

    Raises:
        ValueError: it cannot be read, or is not RGB and not to be converted.
    """
    from PIL import Image, ImageOps

    image = read_picture(path)
    if image.mode != "RGB" and not convert:
        raise ValueError(f"{path} is a picture of mode {image.mode}; it must be RGB")
    image = image.convert("RGB")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_batches(paths: Sequence[Path], batch: int, size: int | None = None, convert: bool = False) -> Iterator[Tensor]:
    """Pictures of equal size as B×3×H×W bytes; ValueError names the first one that differs."""
    with ThreadPoolExecutor() as pool:
        shape = None
        for start in range(0, len(paths), batch):
            part = paths[start : start + batch]
            images = list(pool.map(lambda path: read_image(path, size, convert), part))
            for path, image in zip(part, images, strict=True):
                shape = shape or image.shape
                if image.shape != shape:
                    raise ValueError(
                        f"{path} has {image.shape[2]}×{image.shape[1]} pixels, {paths[0]} {shape[2]}×{shape[1]}; "
                        "they must have the same size"
                    )
            yield torch.stack(images)


def content_hash(paths: Sequence[Path], *also: str) -> str:
    """The SHA-256 of files' contents, in this order, and of some words."""
    digest = hashlib.sha256("\0".join(also).encode())
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
