"""Figures of an evaluation, as SVG that takes its colours from the page around it."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from agentsd.evaluation.networks import require

INK = "#123456"  # becomes the colour of the page's text
GREY = "#7f7f7f"


def figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Title and SVG of each figure: quality against speed with the Pareto front, and bars with intervals."""
    require("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    ink = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), INK)
    plain = dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "agentsd", "font.size": 9, **ink, **plain}
    drawn: list[tuple[str, str]] = []
    with matplotlib.rc_context(style):
        for column in _drawn(result):
            if all("time" in row for row in result["methods"]) and len(result["methods"]) > 1:
                drawn.append((f"{column['label']} against speed", _scatter(result, column)))
            title = f"{column['label']}, with intervals"
            if any("difference" in row["scores"].get(column["key"], {}) for row in result["methods"]):
                title += "; dark: that of the difference to stock"
            drawn.append((title, _bars(result, column)))
    return drawn


def _drawn(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The first distance to the reference, the first score of adherence and the first of closeness to stock."""
    columns = result["columns"]
    kinds = (r".*_frechet", r"clip|attributes_all", r"psnr|lpips|ssim")
    found = [next((c for c in columns if re.fullmatch(kind, c["key"])), None) for kind in kinds]
    return [column for column in columns if column in found]


def pareto(points: Sequence[tuple[float, float]], less: bool) -> list[int]:
    """Which of the points (speed, quality) no other beats in one without losing in the other, by rising speed."""
    sign = -1 if less else 1
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -sign * points[i][1]))
    best, front = -math.inf, []
    for index in order:
        if sign * points[index][1] > best:
            best = sign * points[index][1]
            front.append(index)
    return front[::-1]


def _families(result: dict[str, Any]) -> dict[str, str]:
    """The colour of each method's name without its options: stock is grey, the others matplotlib's in their order."""
    names = dict.fromkeys(map(_family, result["methods"][1:]))
    return {name: f"C{index}" for index, name in enumerate(names)} | {_family(result["methods"][0]): GREY}


def _family(row: dict[str, Any]) -> str:
    return str(row["method"]).partition(":")[0]


def _known(result: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [row for row in result["methods"] if row["scores"].get(key, {}).get("value") is not None]


def _scatter(result: dict[str, Any], column: dict[str, Any]) -> str:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(4.8, 3.7), layout="constrained")
    rows = [row for row in _known(result, column["key"]) if "speed" in row["time"]]
    points = [(row["time"]["speed"], row["scores"][column["key"]]["value"]) for row in rows]
    front = pareto(points, column["better"] == "less")
    axis.plot(*zip(*[points[i] for i in front], strict=True), color=INK, alpha=0.25, linewidth=5, label="Pareto front")
    for name, colour in _families(result).items():
        members = [i for i, row in enumerate(rows) if _family(row) == name]
        if members:
            xs, ys = zip(*[points[i] for i in members], strict=True)
            axis.plot(xs, ys, color=colour, marker="o", markersize=5, linewidth=1, label=name, zorder=3)
        for i in members:
            if interval := rows[i]["scores"][column["key"]].get("interval"):
                axis.plot([points[i][0]] * 2, interval, color=colour, alpha=0.45, linewidth=1.5)
            if len(members) > 1:
                text = ",".join(re.findall(r"=([^,]*)", rows[i]["method"]))
                axis.annotate(text, points[i], xytext=(4, 4), textcoords="offset points", fontsize=7, color=INK)
    axis.set(xlabel="speed, × stock", ylabel=f"{column['label']} ({column['better']} is better)")
    axis.grid(alpha=0.2, color=INK)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return _svg(figure, f"{column['label']} against speed")


def _bars(result: dict[str, Any], column: dict[str, Any]) -> str:
    from matplotlib import pyplot as plt

    rows, colours = _known(result, column["key"])[::-1], _families(result)
    figure, axis = plt.subplots(figsize=(4.8, 0.9 + 0.24 * len(rows)), layout="constrained")
    for height, row in enumerate(rows):
        found, colour = row["scores"][column["key"]], colours[_family(row)]
        if "interval" in found:
            axis.plot(found["interval"], [height] * 2, color=colour, linewidth=6, alpha=0.35, solid_capstyle="butt")
        axis.plot(found["value"], height, "o", color=colour, markersize=5)
        if "difference" in found:
            ends = [found["value"] - found["difference"]["value"] + end for end in found["difference"]["interval"]]
            axis.plot(ends, [height] * 2, color=colour, linewidth=2)
        if row is result["methods"][0]:
            axis.axvline(found["value"], color=INK, alpha=0.35, linewidth=1, linestyle="--")
    axis.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlabel({"less": "← less is better", "more": "more is better →"}[column["better"]])
    axis.grid(alpha=0.2, color=INK, axis="x")
    return _svg(figure, f"{column['label']}, with intervals")


def _svg(figure: Any, title: str) -> str:
    from matplotlib import pyplot as plt

    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Title": title})
    plt.close(figure)
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg ", '<svg role="img" ', 1)
