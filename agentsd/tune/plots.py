"""The front of the predictions and the configurations verified, as a plot."""

from pathlib import Path
from typing import Any

from agentsd.results import save_figure


def draw_front(result: dict[str, Any], path: Path) -> None:
    """Plot a result of agentsd-tune."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), dpi=110, layout="constrained")
    axis = figure.subplots()
    front = [(speedup, error) for speedup, error, _ in result["front"] if error]
    axis.plot(*zip(*front, strict=True), "-", color="0.6", lw=1, marker=".", ms=3, label="predicted front")
    tuned = [one for one in result["verified"] if one["predicted"]]
    for one in tuned:
        measured = one["speedup"], one["error"]
        axis.plot(*zip(one["predicted"], measured, strict=True), "-", color="C0", lw=0.6)
        label = None if one is not tuned[0] else "verified by whole images"
        axis.plot(*measured, "o", color="C0", label=label)
        if one["name"] == result["chosen"]:
            axis.plot(*measured, "*", color="C1", ms=16, label="chosen", zorder=3)
    for index, one in enumerate(one for one in result["verified"] if not one["predicted"]):
        axis.plot(one["speedup"], one["error"], "s", color=f"C{index + 2}", label=f"preset {one['name']}")
    line, target = (axis.axvline, "speedup") if result["target"]["speedup"] is not None else (axis.axhline, "error")
    line(result["target"][target], color="k", ls=":", label="target")
    axis.set(yscale="log", xlabel="speed of whole images, stock = 1", ylabel="root-mean-square error to stock, of 1")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save_figure(figure, path)
