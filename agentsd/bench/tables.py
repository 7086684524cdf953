"""Tables of stored measurements."""

import statistics
from pathlib import Path
from typing import Any

from agentsd.bench.latency import Timing
from agentsd.results import markdown_table, read_json

HEAD = ("method", "share of the steps", "ms per UNet call", "faster than stock", "of its floor's speed", "peak GiB")


def read(path: Path) -> dict[str, Any]:
    """A file of measurements; ValueError names it if it is none."""
    result = read_json(path)
    if not isinstance(result, dict) or not result.keys() & {"runs", "layers", "parts", "psnr", "launches"}:
        raise ValueError(f"{path} is not a file of measurements: it has none of runs, layers, parts, psnr, launches")
    return result


def _covered(timing: dict[str, Any]) -> tuple[int, ...]:
    """The levels whose self-attention alone a method acts on."""
    # Files from before coverage was stored: these were of the finest grid.
    finest = (
        timing["method"].split(":")[0] in ("floor", "paper", "faithful", "tomesd") and ":levels" not in timing["method"]
    )
    return tuple(timing.get("covered", [1] if finest else None) or ())


def _floors(run: dict[str, Any]) -> dict[str, str]:
    """The floor of each method: what leaves out just the self-attention that the method covers."""
    covered = {timing["method"]: _covered(timing) for timing in run["timings"]}
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


def _filled(run: dict[str, Any]) -> list[list[str]]:
    """Head and rows without the columns that have nothing in them."""
    body = rows(run)
    used = [index for index in range(len(HEAD)) if any(row[index] for row in body)]
    return [[row[index] for index in used] for row in (list(HEAD), *body)]


def _title(run: dict[str, Any], environment: dict[str, Any]) -> str:
    setting = run["setting"]
    height, width = setting["latent"]
    how = "compiled" if setting["compile"] else "eager"
    how += ", fused attention only" if setting.get("fused") else ""
    if "timings" in run and all(len(timing["seconds"]) == 1 for timing in run["timings"]):
        how += ", one repetition"
    what = f"{setting['model']}, {width}×{height} latents, batch {setting['batch']}, {setting['dtype']}, {how}"
    return f"{what}, {_machine(environment)}"


def _machine(environment: dict[str, Any]) -> str:
    return (
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"diffusers {environment['diffusers']}"
    )


def text(result: dict[str, Any]) -> str:
    """The tables of all runs, aligned."""
    blocks = []
    for run in result["runs"]:
        table = _filled(run)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        pad = [str.ljust, *[str.rjust] * (len(widths) - 1)]
        lines = [
            "  ".join(to(cell, width) for to, cell, width in zip(pad, line, widths, strict=True)) for line in table
        ]
        blocks.append("\n".join([_title(run, result["environment"]), "", lines[0], "─" * len(lines[0]), *lines[1:]]))
    return "\n\n".join(blocks)


def _layers(result: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    def table(
        values: dict[str, dict[str, float]], unit: str, scale: float, exponents: dict[str, float]
    ) -> list[list[str]]:
        tokens = list(next(iter(values.values())))
        head = ["layer", *(f"{int(n):,} tokens, {unit}" for n in tokens), "exponent from 4,096"]
        body = [
            [name, *(f"{value * scale:.1f}" for value in row.values()), f"{exponents[name]:.2f}"]
            for name, row in values.items()
        ]
        return [head, *body]

    setting, machine = result["setting"], _machine(result["environment"])
    what = f"one self-attention layer of SD 1.5's finest grid, batch {setting['batch']}, {setting['dtype']}"
    tables = [(f"{what}, {machine}", table(result["layers"], "ms", 1000, result["exponents"]))]
    if "memory" in result:
        memory = table(result["memory"], "MiB", 2**-20, result["memory_exponents"])
        tables.append(("the same, memory of a call: its output and all in between", memory))
    return tables


def _closeness(result: dict[str, Any]) -> tuple[str, list[list[str]]]:
    several = isinstance(result["steps"], list)
    table = [["method", *(["× stock"] if several else []), "PSNR to the stock image, mean / worst, dB"]]
    for name, decibels in result["psnr"].items():
        faster = [f"{result['speedup'][name]:.2f}×"] if several else []
        table.append([name, *faster, f"{statistics.mean(decibels):.1f} / {min(decibels):.1f}"])
    size = f", {result['size']} pixels a side" if "size" in result else ""
    steps = f"{', '.join(map(str, result['steps'])) if several else result['steps']} steps{size}"
    what = f"the embedded model, {result['prompts']} held-out prompts, {steps}, {result['dtype']}"
    return f"{what}, {_machine(result['environment'])}", table


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result in Markdown, each under what was measured, and the command."""
    environment = result["environment"]
    if "layers" in result:
        tables = _layers(result)
    elif "psnr" in result:
        tables = [_closeness(result)]
    elif "parts" in result:
        table = [["ms", *next(iter(result["parts"].values())), "sum"]]
        for name, parts in result["parts"].items():
            table.append([name, *(f"{1000 * seconds:.0f}" for seconds in (*parts.values(), sum(parts.values())))])
        tables = [(_title(result, environment), table)]
    elif "launches" in result:
        counts = [[name, f"{count:,}"] for name, count in result["launches"].items()]
        tables = [(_title(result, environment), [["call", "operations"], *counts])]
    else:
        tables = [(_title(run, environment), _filled(run)) for run in result["runs"]]
    command = f"```bash\n{result['command']}\n```\n\n" if "command" in result else ""
    return command + "\n\n".join(f"*{title}*\n\n{markdown_table(table[0], table[1:])}" for title, table in tables)
