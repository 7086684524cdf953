"""The picture of a comparison: images side by side, their difference and what was measured."""

import math
import unicodedata
from bisect import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont


def psnr(image: "Image", reference: "Image") -> float:
    """Return the peak signal-to-noise ratio of two 8-bit images in dB, infinite if they are equal."""
    import numpy as np

    error = np.mean((np.asarray(image, dtype=np.float64) - np.asarray(reference, dtype=np.float64)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def difference(image: "Image", reference: "Image") -> tuple["Image", int]:
    """Return the absolute difference, amplified by a power of two so that it is seen, and the factor."""
    import numpy as np
    from PIL import Image

    delta = np.abs(np.asarray(image, dtype=np.int16) - np.asarray(reference, dtype=np.int16))
    high = float(np.percentile(delta, 99.5))
    factor = 2 ** max(0, min(6, int(math.log2(255 / high)))) if high else 1
    return Image.fromarray((delta * factor).clip(0, 255).astype(np.uint8)), factor


def comparison(panels: Sequence[tuple["Image", str, str]], title: str, footer: str) -> "Image":
    """Return one picture with images side by side, each under a heading and over a line, a title and a footer."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = panels[0][0].size
    zoom = max(1, round(448 / width))
    width, height = width * zoom, height * zoom
    unit = max(14, width // 26)
    margin = unit * 3 // 2
    sizes = {"title": unit * 1.3, "head": unit * 1.1, "text": unit}
    fonts = {name: ImageFont.load_default(size) for name, size in sizes.items()}
    total = len(panels) * (width + margin) + margin
    top = _wrap(title, fonts["title"], total - 2 * margin, 4)
    bottom = _wrap(footer, fonts["text"], total - 2 * margin, 8)
    line = unit * 3 // 2
    y_head = margin + len(top) * (line + unit // 4) + unit
    y_image = y_head + line + unit // 2
    y_text = y_image + height + unit // 2
    y_footer = y_text + line + unit
    picture = Image.new("RGB", (total, y_footer + unit // 2 + len(bottom) * line + margin), "white")
    draw = ImageDraw.Draw(picture)
    for row, text in enumerate(top):
        draw.text((margin, margin + row * (line + unit // 4)), text, font=fonts["title"], fill="#111111")
    for column, (image, head, text) in enumerate(panels):
        x = margin + column * (width + margin)
        draw.text((x, y_head), plain(head), font=fonts["head"], fill="#555555")
        picture.paste(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (x, y_image))
        draw.rectangle((x - 1, y_image - 1, x + width, y_image + height), outline="#c8c8c8")
        draw.text((x, y_text), plain(text), font=fonts["head"], fill="#111111")
    draw.line((margin, y_footer, total - margin, y_footer), fill="#d8d8d8")
    for row, text in enumerate(bottom):
        draw.text((margin, y_footer + unit // 2 + row * line), text, font=fonts["text"], fill="#666666")
    return picture


def _wrap(text: str, font: "FreeTypeFont | ImageFont", width: int, most: int) -> list[str]:
    """Return text in lines of at most `width` pixels; what is beyond `most` lines becomes an ellipsis."""
    lines = [""]
    for word in plain(text).split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
        while font.getlength(lines[-1]) > width:  # one word is longer than a line
            fits = bisect(range(1, len(lines[-1])), width, key=lambda end: math.ceil(font.getlength(lines[-1][:end])))
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    if len(lines) > most:
        lines[most - 1] = lines[most - 1][:-3] + "..."
    return lines[:most]


def plain(text: str) -> str:
    """Return text in the characters that Pillow's own font has."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "replace").decode()
