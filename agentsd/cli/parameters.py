"""The ``parameters`` text of a PNG file, in the form that the common web UIs write and read.

The prompt, a line ``Negative prompt: …`` if there is one, and a line of ``key: value`` pairs; values with a comma, a
colon or a line break are quoted as JSON strings.
"""

import json
import re
from pathlib import Path

from agentsd.cli.images import read_picture

_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
_EXACT = "AgentSD prompts"


def format_parameters(prompt: str, negative_prompt: str, fields: dict[str, object]) -> str:
    """Return the text; fields that are None are left out.

    A prompt that the form cannot carry (one with a line like ``Negative prompt: …``, or spaces at the end of a line) is
    written a second time, quoted, so that nothing is lost.
    """
    pairs = [f"{key}: {_quote(str(value))}" for key, value in fields.items() if value is not None]
    lines = [prompt, *([f"{_NEGATIVE} {negative_prompt}"] if negative_prompt else []), ", ".join(pairs)]
    text = "\n".join(lines)
    if parse_parameters(text)[:2] == (prompt, negative_prompt):
        return text
    return f"{text}, {_EXACT}: {_quote(json.dumps([prompt, negative_prompt]))}"


def parse_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """Return prompt, negative prompt and fields of a text as the web UIs read it."""
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
    """Return what :func:`parse_parameters` finds in a PNG file."""
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
