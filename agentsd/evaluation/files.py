"""Files of an evaluation: pictures that are whole or not there, and reading folders of them."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
_TEXT = "agentsd-eval"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all."""
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON, complete or not at all."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; ValueError names the file if it is not."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None


def write_png(path: Path, image: "Image", text: dict[str, Any]) -> None:
    """Write a picture with what it is, whole or not at all; the same picture makes the same bytes."""
    from io import BytesIO

    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(_TEXT, json.dumps(text, sort_keys=True, ensure_ascii=False))
    stream = BytesIO()
    image.save(stream, "PNG", pnginfo=info)
    write_bytes(path, stream.getvalue())


def is_finished(path: Path, text: dict[str, Any]) -> bool:
    """Whether a PNG file is there, whole (by the checksums in it) and what `text` says."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            same = image.info.get(_TEXT) == json.dumps(text, sort_keys=True, ensure_ascii=False)
            image.verify()
            return same
    except (OSError, SyntaxError, ValueError):
        return False


def pictures(folder: Path, per_class: int | None = None, number: int | None = None) -> list[Path]:
    """The pictures below a folder in the order of their names.

    Args:
        folder: where to look, subfolders included.
        per_class: only the first so many of each folder.
        number: only the first so many of all; there must be as many.

    Raises:
        ValueError: there is no such folder, or it holds no picture, or fewer than `number`.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of pictures")
    found: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURES and not path.name.startswith("."):
            found.setdefault(path.parent, []).append(path)
    paths = [path for _, inside in sorted(found.items()) for path in inside[:per_class]]
    if not paths:
        raise ValueError(f"{folder} holds no picture ({', '.join(PICTURES)})")
    if number is not None and len(paths) < number:
        raise ValueError(f"{folder} holds {len(paths)} pictures; the protocol takes {number}")
    return paths[:number]


def read_image(path: Path, size: int | None = None, convert: bool = False) -> Tensor:
    """A picture as 3×H×W bytes.

    Args:
        path: of the file.
        size: scale the shorter side to so many pixels and cut out the middle.
        convert: take pictures that are not RGB too.

    Raises:
        ValueError: it cannot be read, or is not RGB.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.load()
            image: Image.Image = file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(f"{path} is not a picture that can be read") from None
    if image.mode != "RGB":
        if not convert:
            raise ValueError(f"{path} is a picture of mode {image.mode}; it must be RGB")
        image = image.convert("RGB")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_batches(paths: Sequence[Path], batch: int, size: int | None = None, convert: bool = False) -> Iterator[Tensor]:
    """Pictures of equal size as B×3×H×W bytes; ValueError names the first one that differs."""
    shape = None
    for start in range(0, len(paths), batch):
        images = []
        for path in paths[start : start + batch]:
            image = read_image(path, size, convert)
            shape = shape or image.shape
            if image.shape != shape:
                raise ValueError(
                    f"{path} has {image.shape[2]}×{image.shape[1]} pixels, {paths[0]} {shape[2]}×{shape[1]}; "
                    "they must have the same size"
                )
            images.append(image)
        yield torch.stack(images)


def content_hash(paths: Sequence[Path], *also: str) -> str:
    """The SHA-256 of files' contents, in this order, and of some words."""
    digest = hashlib.sha256("\0".join(also).encode())
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
