"""Pictures: reading them, how far apart two are, side by side in one, and the text that a PNG file carries.

The text is the `parameters` chunk that the common web UIs write and read: the prompt, a line `Negative prompt: …` if
there is one, and a line of `key: value` pairs. Values with a comma, a colon or a line break are quoted as JSON strings.
"""

import json
import math
import re
import unicodedata
from bisect import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
_EXACT = "AgentSD prompts"


def read_picture(path: Path) -> Image.Image:
    """The picture in a file; ValueError if there is none that can be read."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        raise ValueError(f"{path} is not a picture that can be read") from error


# How far apart two images are


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit images in dB, infinite if they are equal."""
    error = np.mean((np.asarray(image, dtype=np.float64) - np.asarray(reference, dtype=np.float64)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def difference(image: Image.Image, reference: Image.Image) -> tuple[Image.Image, int]:
    """The absolute difference, amplified by a power of two so that it is seen, and the factor."""
    delta = np.abs(np.asarray(image, dtype=np.int16) - np.asarray(reference, dtype=np.int16))
    high = float(np.percentile(delta, 99.5))
    factor = 2 ** max(0, min(6, int(math.log2(255 / high)))) if high else 1
    return Image.fromarray((delta * factor).clip(0, 255).astype(np.uint8)), factor


# Side by side


def comparison(panels: Sequence[tuple[Image.Image, str, str]], title: str, footer: str) -> Image.Image:
    """One picture with images side by side, each under a heading and over a line, a title and a footer."""
    width, height = panels[0][0].size
    zoom = max(1, round(448 / width))
    width, height = width * zoom, height * zoom
    unit = max(14, width // 26)
    margin = unit * 3 // 2
    title_font, head_font, text_font = (ImageFont.load_default(unit * scale) for scale in (1.3, 1.1, 1))
    total = len(panels) * (width + margin) + margin
    top = _wrap(title, title_font, total - 2 * margin, 4)
    bottom = _wrap(footer, text_font, total - 2 * margin, 8)
    line = unit * 3 // 2
    y_head = margin + len(top) * (line + unit // 4) + unit
    y_image = y_head + line + unit // 2
    y_text = y_image + height + unit // 2
    y_footer = y_text + line + unit
    picture = Image.new("RGB", (total, y_footer + unit // 2 + len(bottom) * line + margin), "white")
    draw = ImageDraw.Draw(picture)
    for row, text in enumerate(top):
        draw.text((margin, margin + row * (line + unit // 4)), text, font=title_font, fill="#111111")
    for column, (image, head, text) in enumerate(panels):
        x = margin + column * (width + margin)
        draw.text((x, y_head), _plain(head), font=head_font, fill="#555555")
        picture.paste(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (x, y_image))
        draw.rectangle((x - 1, y_image - 1, x + width, y_image + height), outline="#c8c8c8")
        draw.text((x, y_text), _plain(text), font=head_font, fill="#111111")
    draw.line((margin, y_footer, total - margin, y_footer), fill="#d8d8d8")
    for row, text in enumerate(bottom):
        draw.text((margin, y_footer + unit // 2 + row * line), text, font=text_font, fill="#666666")
    return picture


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """Text in lines of at most `width` pixels; what is beyond `most` lines becomes an ellipsis."""
    lines = [""]
    for word in _plain(text).split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
        while font.getlength(lines[-1]) > width:  # one word is longer than a line
            fits = bisect(range(1, len(lines[-1])), width, key=lambda end: math.ceil(font.getlength(lines[-1][:end])))
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    if len(lines) > most:
        lines[most - 1] = lines[most - 1][:-3] + "..."
    return lines[:most]


def _plain(text: str) -> str:
    """Text in the characters that Pillow's built-in font has."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "replace").decode()


# The text that a PNG file carries


def format_parameters(prompt: str, negative_prompt: str, fields: Mapping[str, object]) -> str:
    """The text; fields that are None are left out.

    A prompt that the form cannot carry (one with a line like `Negative prompt: …`, or spaces at the end of a line) is
    written a second time, quoted, so that nothing is lost.
    """
    pairs = [f"{key}: {_quote(str(value))}" for key, value in fields.items() if value is not None]
    lines = [prompt, *([f"{_NEGATIVE} {negative_prompt}"] if negative_prompt else []), ", ".join(pairs)]
    text = "\n".join(lines)
    if parse_parameters(text)[:2] == (prompt, negative_prompt):
        return text
    return f"{text}, {_EXACT}: {_quote(json.dumps([prompt, negative_prompt]))}"


def parse_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and fields of a text, as the web UIs read it."""
    *lines, last = text.strip().split("\n")
    fields = {key: _unquote(value) for key, value in _PAIR.findall(last)}
    if len(fields) < 3:
        lines, fields = [*lines, last], {}
    if _EXACT in fields:
        prompt, negative_prompt = json.loads(fields[_EXACT])
        return prompt, negative_prompt, fields
    lines = [line.strip() for line in lines]
    start = next((index for index, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = [line.removeprefix(_NEGATIVE).strip() for line in lines[start:]]
    return "\n".join(lines[:start]), "\n".join(negative), fields


def read_parameters(path: Path) -> tuple[str, str, dict[str, str]]:
    """What `parse_parameters` finds in a PNG file."""
    text = read_picture(path).info.get("parameters")
    if not isinstance(text, str):
        raise ValueError(f"{path} carries no generation parameters")
    return parse_parameters(text)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def _unquote(text: str) -> str:
    try:
        return json.loads(text) if text.startswith('"') else text
    except ValueError:
        return text
