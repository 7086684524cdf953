"""The report of an evaluation: one HTML file that opens offline, Markdown and JSON, all from one result."""

import base64
import io
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agentsd.evaluation.columns import Column
from agentsd.evaluation.networks import require
from agentsd.results import filled, markdown_table, read_json, write_json, write_text

MARK = "agentsd-eval"
THUMBNAIL = 256
PER_METHOD = 6
# key of a row's time: label, explanation, unit
_TIMES = {
    "seconds": ("s/image", "median over batches", 1),
    "speed": ("× stock", "median ratio on the same batches", 1),
    "memory": ("GiB/image", "median of the peaks", 2**30),
}


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write results.json, report.md and report.html; returns their paths."""
    paths = [folder / name for name in ("results.json", "report.md", "report.html")]
    write_json(paths[0], result)
    write_text(paths[1], markdown(result))
    write_text(paths[2], page(result, folder))
    return paths


def read(path: Path) -> dict[str, Any]:
    """Read results.json, or that of a folder; ValueError if it is none."""
    file = path / "results.json" if path.is_dir() else path
    result = read_json(file)
    if not isinstance(result, dict) or not {"columns", "methods", "provenance"} <= result.keys():
        raise ValueError(f"{file} is not a file of results: it has no columns, methods and provenance")
    return result


@dataclass(frozen=True)
class Cell:
    """A value, half of its interval, and how it compares with stock's."""

    text: str = ""
    half: str = ""
    verdict: str = ""

    @property
    def kind(self) -> str:
        return "noise" if self.verdict == "≈" else self.verdict

    def __str__(self) -> str:
        return " ".join(part for part in (self.text, self.half, self.verdict) if part)


def _cell(column: Column, found: dict[str, Any] | None) -> Cell:
    if found is None:
        return Cell()
    if found["value"] is None:
        return Cell("identical" if column.key.startswith("psnr") else "–", "", verdict(column, found))
    low, high = found.get("interval", (0, 0))
    half = f"± {(high - low) / 2:.{column.digits}f}" if "interval" in found else ""
    return Cell(f"{found['value']:.{column.digits}f}", half, verdict(column, found))


def verdict(column: Column, found: dict[str, Any]) -> str:
    """`≈` where the difference to stock is within noise, otherwise whether it is better or worse."""
    difference = found.get("difference")
    if difference is None:
        return ""
    if difference["noise"]:
        return "≈"
    return "better" if (difference["value"] < 0) == (column.better == "less") else "worse"


def _columns(result: dict[str, Any]) -> list[Column]:
    return [Column(**column) for column in result["columns"]]


def _grid(result: dict[str, Any], keys: list[str] | None = None) -> tuple[list[tuple[str, str]], list[list[Cell]]]:
    """Heads with what they mean, and rows of the table; `keys` chooses scores."""
    shown = [column for column in _columns(result) if keys is None or column.key in keys]
    timed = [key for key in _TIMES if any(key in row.get("time", {}) for row in result["methods"])]
    heads = [("method", ""), *(_TIMES[key][:2] for key in timed)]
    heads += [(f"{column.label} {column.arrow}".strip(), column.about) for column in shown]
    rows = []
    for row in result["methods"]:
        time = row.get("time", {})
        cells = [Cell(f"{time[key] / _TIMES[key][2]:.2f}") if key in time else Cell() for key in timed]
        cells += [_cell(column, row["scores"].get(column.key)) for column in shown]
        rows.append([Cell(row["method"]), *cells])
    return heads, rows


def table(result: dict[str, Any], keys: list[str] | None = None) -> str:
    """The scores in Markdown; `keys` chooses columns."""
    heads, rows = _grid(result, keys)
    return markdown_table([head for head, _ in heads], rows)


def findings(result: dict[str, Any]) -> list[str]:
    """One sentence for each method: what is better and worse than stock, and what is within noise."""
    lines = []
    for row in result["methods"][1:]:
        said: dict[str, list[str]] = {"better": [], "worse": [], "within noise": [], "the same": []}
        for column in _columns(result):
            found = row["scores"].get(column.key, {})
            if "difference" not in found:
                continue
            value, (low, high) = found["difference"]["value"], found["difference"]["interval"]
            if value == low == high == 0:
                said["the same"].append(column.label)
                continue
            numbers = f" {value:+.{column.digits}f} ({low:+.{column.digits}f} … {high:+.{column.digits}f})"
            said[verdict(column, found).replace("≈", "within noise")].append(column.label + numbers)
        if parts := [f"{name}: {', '.join(items)}" for name, items in said.items() if items]:
            lines.append(f"{row['method']}: {'; '.join(parts)}.")
    return lines


def facts(result: dict[str, Any]) -> dict[str, str]:
    """Where the numbers come from, by name."""
    found: dict[str, Any] = dict(result["provenance"])
    for number, session in enumerate(found.pop("sessions", []), 1):
        found[f"session {number}, command"] = " ".join(session["command"])
        found[f"session {number}"] = {key: value for key, value in session.items() if key != "command"}
    return {key: _listed(value) for key, value in found.items() if value is not None}


def _listed(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)


def markdown(result: dict[str, Any]) -> str:
    """The report in Markdown, without pictures."""
    return _render("report.md", result, table=table(result))


def page(result: dict[str, Any], folder: Path) -> str:
    """The report in HTML, with figures and pictures inside, whose paths start from `folder`."""
    from agentsd.evaluation.figures import figures

    heads, rows = _grid(result)
    stock, *others = result["methods"]
    pairs = [(row["method"], [_pair(stock, row, s, folder) for s in row["pictures"][:PER_METHOD]]) for row in others]
    return _render("report.html", result, heads=heads, rows=rows, figures=figures(result), pairs=pairs)


def _render(template: str, result: dict[str, Any], **values: Any) -> str:
    require("jinja2")
    from jinja2 import Environment, PackageLoader, select_autoescape

    lines: Any = dict.fromkeys(("trim_blocks", "lstrip_blocks", "keep_trailing_newline"), True)
    environment = Environment(loader=PackageLoader("agentsd.evaluation"), autoescape=select_autoescape(), **lines)
    rows, protocol = result["methods"], result["protocol"]
    return environment.get_template(template).render(
        result=result,
        findings=findings(result),
        facts=facts(result),
        methods=[row | {"text": json.dumps(s, ensure_ascii=False)} for row in rows if (s := row.get("settings"))],
        protocol=protocol and yaml.safe_dump(protocol, sort_keys=False, allow_unicode=True).rstrip(),
        **values,
    )


def _pair(
    stock: dict[str, Any], row: dict[str, Any], shown: dict[str, Any], folder: Path
) -> tuple[list[tuple[str, str]], str]:
    """Both pictures with their names, and the caption."""
    named = ((stock["method"], shown["stock_file"]), (row["method"], shown["file"]))
    caption = [f"“{shown['prompt']}”"] if shown.get("prompt") else []
    caption.append(f"image {shown['index']}")
    caption += [f"{k} {shown[k]:.4g}" for k in ("psnr", "lpips", "checker", "ssim") if shown.get(k) is not None]
    return [(name, _thumbnail(folder / file)) for name, file in named], ", ".join(caption)


def _thumbnail(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


# Tables in documents, made from the files of results that they name


def renewed(document: Path) -> str:
    """A document with new tables between `<!-- agentsd-eval FILE.json COLUMN … -->` and `<!-- /agentsd-eval -->`.

    Paths start from the document's folder.

    Raises:
        ValueError: it has no such lines, or a file is not one of results.
    """
    return filled(document, MARK, lambda words: summary(document.parent / words[0], words[1:]))


def fill(documents: list[Path]) -> None:
    """Renew the tables of documents; where one cannot be, none is written."""
    for document, text in [(document, renewed(document)) for document in documents]:
        write_text(document, text)


def summary(path: Path, columns: list[str] | None = None) -> str:
    """The commands behind results.json or a run's folder, what they were run on, and the table in Markdown.

    Raises:
        ValueError: it is no file of results, or has none of `columns`, the keys of the scores to show.
    """
    result = read(path)
    known = [column["key"] for column in result["columns"]]
    if unknown := [key for key in columns or () if key not in known]:
        raise ValueError(f"--columns is {unknown[0]!r}; it must be of {', '.join(known)}")
    provenance = result["provenance"]
    images, sessions = provenance.get("images", {}), provenance.get("sessions", [])
    commands = [*(shlex.join(session["command"]) for session in sessions[-1:]), provenance["scored with"]["command"]]
    machine: dict[str, Any] = sessions[-1] if sessions else {}
    caption = [
        result["title"],
        images and f"{images['steps']} steps",
        images.get("dtype"),
        machine.get("device"),
        machine and f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}",
        *(machine and f"{name} {machine[name]}" for name in ("torch", "diffusers")),
    ]
    typed = "\n".join(dict.fromkeys(commands))
    return f"```bash\n{typed}\n```\n\n*{', '.join(filter(None, caption))}*\n\n{table(result, columns)}"
