"""The report of an evaluation: one HTML file that opens offline, Markdown and JSON, all from one result."""

import base64
import html
import io
from importlib.resources import files
from pathlib import Path
from typing import Any

from agentsd.evaluation.figures import figures
from agentsd.evaluation.files import read_json, write_bytes, write_json
from agentsd.evaluation.scoring import Column

THUMBNAIL = 256
PER_METHOD = 6


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write results.json, report.md and report.html; returns their paths."""
    paths = [folder / name for name in ("results.json", "report.md", "report.html")]
    write_json(paths[0], result)
    write_bytes(paths[1], markdown(result).encode())
    write_bytes(paths[2], page(result, folder).encode())
    return paths


def read(path: Path) -> dict[str, Any]:
    """Read results.json, or that of a folder.

    Raises:
        ValueError: it is none.
    """
    file = path / "results.json" if path.is_dir() else path
    result = read_json(file)
    if not isinstance(result, dict) or not {"columns", "methods", "provenance"} <= result.keys():
        raise ValueError(f"{file} is not a file of results: it has no columns, methods and provenance")
    return result


def _columns(result: dict[str, Any]) -> list[Column]:
    return [Column(**column) for column in result["columns"]]


def _timed(result: dict[str, Any]) -> bool:
    return any("time" in row for row in result["methods"])


def _remembered(result: dict[str, Any]) -> bool:
    return any("memory" in row.get("time", {}) for row in result["methods"])


def verdict(column: Column, found: dict[str, Any]) -> str:
    """`≈` where the difference to stock is within noise, otherwise whether it is better or worse."""
    difference = found.get("difference")
    if difference is None:
        return ""
    if difference["noise"]:
        return "≈"
    return "better" if (difference["value"] < 0) == (column.better == "less") else "worse"


def _cell(column: Column, found: dict[str, Any] | None) -> tuple[str, str]:
    """The value, and half of its interval."""
    if found is None:
        return "", ""
    if found["value"] is None:
        return "identical" if column.key.startswith("psnr") else "–", ""
    half = ""
    if "interval" in found:
        low, high = found["interval"]
        half = f"± {(high - low) / 2:.{column.digits}f}"
    return f"{found['value']:.{column.digits}f}", half


def table(result: dict[str, Any], keys: list[str] | None = None) -> str:
    """The scores in Markdown; `keys` chooses columns."""
    shown = [column for column in _columns(result) if keys is None or column.key in keys]
    timed, memory = _timed(result), _remembered(result)
    head = ["method", *(["s/image", "× stock"] if timed else []), *(["GiB/image"] if memory else [])]
    head += [f"{column.label} {_arrow(column)}".strip() for column in shown]
    lines = [head]
    for row in result["methods"]:
        time = row.get("time", {})
        cells = [row["method"]]
        if timed:
            cells += [f"{time['seconds']:.2f}" if time else "", f"{time['speed']:.2f}" if "speed" in time else ""]
        if memory:
            cells.append(f"{time['memory'] / 2**30:.2f}" if "memory" in time else "")
        for column in shown:
            found = row["scores"].get(column.key)
            cells.append(" ".join(part for part in (*_cell(column, found), verdict(column, found or {})) if part))
        lines.append(cells)
    text = ["| " + " | ".join(cells) + " |" for cells in lines]
    text.insert(1, "|" + "---|" * len(head))
    return "\n".join(text)


def _arrow(column: Column) -> str:
    return {"less": "↓", "more": "↑"}.get(column.better, "")


def findings(result: dict[str, Any]) -> list[str]:
    """One sentence for each method: what is better and worse than stock, and what is within noise."""
    lines = []
    for row in result["methods"][1:]:
        said: dict[str, list[str]] = {"better": [], "worse": [], "≈": [], "same": []}
        for column in _columns(result):
            found = row["scores"].get(column.key, {})
            if "difference" not in found:
                continue
            value, (low, high) = found["difference"]["value"], found["difference"]["interval"]
            if value == low == high == 0:
                said["same"].append(column.label)
                continue
            numbers = f" {value:+.{column.digits}f} ({low:+.{column.digits}f} … {high:+.{column.digits}f})"
            said[verdict(column, found)].append(column.label + numbers)
        titles = {"better": "better", "worse": "worse", "≈": "within noise", "same": "the same"}
        parts = [f"{titles[name]}: {', '.join(items)}" for name, items in said.items() if items]
        if parts:
            lines.append(f"{row['method']}: {'; '.join(parts)}.")
    return lines


def facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the numbers come from."""
    provenance = result["provenance"]
    found = []
    for key, value in provenance.items():
        if key == "sessions":
            for number, session in enumerate(value, 1):
                about = {k: v for k, v in session.items() if k != "command" and v is not None}
                found.append((f"session {number}, command", " ".join(session["command"])))
                found.append((f"session {number}", ", ".join(f"{k} {v}" for k, v in about.items())))
        elif isinstance(value, dict):
            found.append((key, ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)))
        elif value is not None:
            found.append((key, str(value)))
    return found


def markdown(result: dict[str, Any]) -> str:
    """The report in Markdown, without pictures."""
    lines = [f"# {result['title']}", "", result["description"], "", table(result), "", LEGEND, ""]
    lines += [f"- {note}" for note in result["notes"]] + [""] * bool(result["notes"])
    lines += (
        ["## Differences to stock", ""] + [f"- {line}" for line in findings(result)] + [""] if findings(result) else []
    )
    lines += ["## Where the numbers come from", ""]
    lines += [f"- {name}: `{value}`" if "command" in name else f"- {name}: {value}" for name, value in facts(result)]
    lines += ["", "## Methods", ""]
    lines += [
        f"- `{row['method']}`, SHA-256 {row['settings_sha256']}: `{_plain(row['settings'])}`" for row in _set(result)
    ]
    if result["protocol"]:
        import yaml

        lines += ["", "## Protocol", "", "```yaml"]
        lines += [yaml.safe_dump(result["protocol"], sort_keys=False, allow_unicode=True).rstrip(), "```"]
    return "\n".join(lines) + "\n"


LEGEND = (
    "± is half of the 95 % interval over resamples of the images. ≈: the difference to stock, image by image of the "
    "same seeds, is within noise; otherwise it is better or worse. Time is the median over batches, × stock the median "
    "ratio on the same batches."
)


def _set(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The methods that have settings."""
    return [row for row in result["methods"] if row.get("settings")]


def _plain(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


def page(result: dict[str, Any], folder: Path) -> str:
    """The report in HTML, with figures and pictures inside.

    Args:
        result: what was found.
        folder: where the paths of its pictures start.
    """
    style = (files("agentsd.evaluation") / "report.css").read_text(encoding="utf-8")
    body = [
        f"<h1>{_e(result['title'])}</h1>",
        f"<p>{_e(result['description'])}</p>",
        _html_table(result),
        f'<p class="small">{_e(LEGEND)}</p>',
    ]
    if result["notes"]:
        body.append("<ul>" + "".join(f"<li>{_e(note)}</li>" for note in result["notes"]) + "</ul>")
    drawn = figures(result)
    if drawn:
        body.append('<div class="figures">')
        body += [f"<figure><figcaption>{_e(title)}</figcaption>{svg}</figure>" for title, svg in drawn]
        body.append("</div>")
    if findings(result):
        body.append(
            "<h2>Differences to stock</h2><ul>" + "".join(f"<li>{_e(line)}</li>" for line in findings(result)) + "</ul>"
        )
    body.append(_pictures(result, folder))
    body.append("<h2>Where the numbers come from</h2><dl>")
    body += [f"<dt>{_e(name)}</dt><dd>{_e(value)}</dd>" for name, value in facts(result)]
    body.append("</dl>")
    if _set(result):
        body.append("<h2>Methods</h2><dl>")
        for row in _set(result):
            settings = f"<code>{_e(_plain(row['settings']))}</code>"
            body.append(f"<dt>{_e(row['method'])}</dt><dd>SHA-256 {row['settings_sha256']}<br>{settings}</dd>")
        body.append("</dl>")
    if result["protocol"]:
        import yaml

        text = yaml.safe_dump(result["protocol"], sort_keys=False, allow_unicode=True)
        body.append(f"<h2>Protocol</h2><pre>{_e(text)}</pre>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_e(result['title'])}</title><style>\n{style}</style></head>"
        "<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def _e(text: str) -> str:
    return html.escape(str(text))


def _html_table(result: dict[str, Any]) -> str:
    shown = _columns(result)
    timed, memory = _timed(result), _remembered(result)
    head = "<th>method</th>" + "<th>s/image</th><th>× stock</th>" * timed + "<th>GiB/image</th>" * memory
    head += "".join(f'<th title="{_e(c.about)}">{_e(c.label)} {_arrow(c)}</th>' for c in shown)
    rows = []
    for row in result["methods"]:
        time = row.get("time", {})
        cells = [f"<th>{_e(row['method'])}</th>"]
        if timed:
            cells.append(f"<td>{time['seconds']:.2f}</td>" if time else "<td></td>")
            cells.append(f"<td>{time['speed']:.2f}</td>" if "speed" in time else "<td></td>")
        if memory:
            cells.append(f"<td>{time['memory'] / 2**30:.2f}</td>" if "memory" in time else "<td></td>")
        for column in shown:
            found = row["scores"].get(column.key)
            value, half = _cell(column, found)
            said = verdict(column, found or {})
            mark = {"≈": "noise", "better": "better", "worse": "worse"}.get(said, "")
            extra = "".join(f"<small>{_e(part)}</small>" for part in (half, said) if part)
            cells.append(f'<td class="{mark}">{_e(value)}{extra}</td>')
        rows.append("<tr>" + "".join(cells) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _pictures(result: dict[str, Any], folder: Path) -> str:
    """Stock beside each method, the largest differences first."""
    blocks = []
    stock = result["methods"][0]
    for number, row in enumerate(result["methods"][1:]):
        pairs = []
        for shown in row["pictures"][:PER_METHOD]:
            sides = [
                f'<div><img src="{_thumbnail(folder / shown[key])}" alt="{_e(name)}"><span>{_e(name)}</span></div>'
                for key, name in (("stock_file", stock["method"]), ("file", row["method"]))
            ]
            values = [f"image {shown['index']}"]
            values += [
                f"{key} {shown[key]:.4g}" for key in ("psnr", "lpips", "checker", "ssim") if shown.get(key) is not None
            ]
            prompt = f"“{shown['prompt']}”, " if shown.get("prompt") else ""
            pairs.append(
                f'<figure class="pair"><div class="sides">{"".join(sides)}</div>'
                f"<figcaption>{_e(prompt + ', '.join(values))}</figcaption></figure>"
            )
        if pairs:
            state = " open" if number == 0 else ""
            blocks.append(
                f"<details{state}><summary>{_e(row['method'])}</summary>"
                f'<div class="pairs">{"".join(pairs)}</div></details>'
            )
    return "<h2>Stock beside each method, the largest differences first</h2>" + "".join(blocks) if blocks else ""


def _thumbnail(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
