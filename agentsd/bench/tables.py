"""Tables of stored measurements."""

import statistics
from pathlib import Path
from typing import Any

from agentsd.bench.latency import Timing
from agentsd.bench.layers import exponent
from agentsd.results import machine, markdown_table, read_json, text_table

# What was measured, and a head with rows.
Table = tuple[str, list[list[str]]]
HEAD = ("method", "share of the steps", "ms per UNet call", "faster than stock", "of its floor's speed", "peak GiB")


def read(path: Path) -> dict[str, Any]:
    """A file of measurements; ValueError names it if it is none."""
    result = read_json(path)
    if not isinstance(result, dict) or not result.keys() & KINDS.keys():
        raise ValueError(f"{path} is not a file of measurements: it has none of {', '.join(KINDS)}")
    return result


def _covered(method: str) -> list[int]:
    """The levels that a method acts on, in files from before these were stored."""
    finest = method.split(":")[0] in ("floor", "paper", "faithful", "tomesd") and ":levels" not in method
    return [1] if finest else []


def _floors(run: dict[str, Any]) -> dict[str, str]:
    """The floor of each method: what leaves out just the self-attention that the method covers."""
    methods = {timing["method"]: timing for timing in run["timings"]}
    covered = {name: tuple(timing.get("covered", _covered(name)) or ()) for name, timing in methods.items()}
    floors = {levels: name for name, levels in covered.items() if name.split(":")[0] == "floor" and levels}
    return {name: floors[levels] for name, levels in covered.items() if levels in floors}


def rows(run: dict[str, Any]) -> list[list[str]]:
    """The table of one run; kinds of calls are below their method."""
    total, floors = run["schedule"], _floors(run)
    timings = [Timing(**timing) for timing in run["timings"]]

    def cells(method: str, seconds: float, spread: float | None) -> list[str]:
        floor = floors.get(method)
        return [
            f"{seconds * 1000:.0f}" + (f" ± {spread * 1000:.0f}" if spread is not None else ""),
            f"{total['stock'] / seconds:.2f}×" if "stock" in total else "",
            f"{total[floor] / seconds:.2f}×" if floor else "",
        ]

    table = []
    for method, seconds in total.items():
        own = [timing for timing in timings if timing.method == method]
        memory = f"{run['memory'][method] / 2**30:.2f}" if method in run["memory"] else ""
        table.append([method, "", *cells(method, seconds, own[0].spread if len(own) == 1 else None), memory])
        for timing in own if len(own) > 1 else ():
            name = f"– {timing.kind}"
            table.append([name, f"{timing.share:.0%}", *cells(method, timing.median, timing.spread), ""])
    return table


def _runs(result: dict[str, Any]) -> list[Table]:
    found = []
    for run in result["runs"]:
        table = [list(HEAD), *rows(run)]
        # Columns with nothing in them are left out.
        used = [index for index, column in enumerate(zip(*table[1:], strict=True)) if any(column)]
        found.append((_title(run, result["environment"]), [[row[index] for index in used] for row in table]))
    return found


def _title(run: dict[str, Any], environment: dict[str, Any]) -> str:
    setting = run["setting"]
    height, width = setting["latent"]
    how = "compiled" if setting["compile"] else "eager"
    how += ", fused attention only" if setting.get("fused") else ""
    if "timings" in run and all(len(timing["seconds"]) == 1 for timing in run["timings"]):
        how += ", one repetition"
    what = f"{setting['model']}, {width}×{height} latents, batch {setting['batch']}, {setting['dtype']}, {how}"
    return f"{what}, {machine(environment)}"


def _layers(result: dict[str, Any]) -> list[Table]:
    setting = result["setting"]
    what = f"one self-attention layer of SD 1.5's finest grid, batch {setting['batch']}, {setting['dtype']}"
    kinds = [
        ("layers", f"{what}, {machine(result['environment'])}", "ms", 1000),
        ("memory", "the same, memory of a call: its output and all in between", "MiB", 2**-20),
    ]
    found = []
    for key, title, unit, scale in kinds:
        lines = [
            [name, *(f"{value * scale:.1f}" for value in row.values()), f"{exponent(row):.2f}"]
            for name, row in result.get(key, {}).items()
        ]
        head = ["layer", *(f"{int(n):,} tokens, {unit}" for n in result["layers"]["stock"]), "exponent from 4,096"]
        found += [(title, [head, *lines])] if lines else []
    return found


def _closeness(result: dict[str, Any]) -> list[Table]:
    several = isinstance(result["steps"], list)
    table = [["method", *(["× stock"] if several else []), "PSNR to the stock image, mean / worst, dB"]]
    for name, decibels in result["psnr"].items():
        faster = [f"{result['speedup'][name]:.2f}×"] if several else []
        table.append([name, *faster, f"{statistics.mean(decibels):.1f} / {min(decibels):.1f}"])
    size = f", {result['size']} pixels a side" if "size" in result else ""
    steps = f"{', '.join(map(str, result['steps'])) if several else result['steps']} steps{size}"
    what = f"the embedded model, {result['prompts']} held-out prompts, {steps}, {result['dtype']}"
    return [(f"{what}, {machine(result['environment'])}", table)]


def _parts(result: dict[str, Any]) -> list[Table]:
    table = [["ms", *next(iter(result["parts"].values())), "sum"]]
    for name, parts in result["parts"].items():
        table.append([name, *(f"{1000 * seconds:.0f}" for seconds in (*parts.values(), sum(parts.values())))])
    return [(_title(result, result["environment"]), table)]


def _launches(result: dict[str, Any]) -> list[Table]:
    counts = [[name, f"{count:,}"] for name, count in result["launches"].items()]
    return [(_title(result, result["environment"]), [["call", "operations"], *counts])]


# By what only files of their kind have.
KINDS = {"runs": _runs, "layers": _layers, "psnr": _closeness, "parts": _parts, "launches": _launches}


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables of a result, each with what was measured."""
    return next(make for key, make in KINDS.items() if key in result)(result)


def text(result: dict[str, Any]) -> str:
    """The tables of a result for a terminal."""
    return "\n\n".join(f"{title}\n\n{text_table(head, body, numbers=True)}" for title, (head, *body) in tables(result))


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result in Markdown, each under what was measured, and the command."""
    command = [f"```bash\n{result['command']}\n```"] if "command" in result else []
    found = [f"*{title}*\n\n{markdown_table(head, body)}" for title, (head, *body) in tables(result)]
    return "\n\n".join([*command, *found])
