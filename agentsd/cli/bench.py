"""agentsd-bench: time and memory of the UNet, stock beside accelerated beside the peers."""

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agentsd.cli import command
from agentsd.cli.command import Parser, formatter, whole

PROGRAM = "agentsd-bench"
MARKS = ("<!-- agentsd-bench -->", "<!-- /agentsd-bench -->")
EXAMPLES = """examples:
  agentsd-bench                                                  stock, the floor and every preset on SD 1.5, 512×512
  agentsd-bench --method stock --method paper:ratio=0.5 --method tomesd:ratio=0.5 --latent 64 96 128
  agentsd-bench --model demo --memory
  agentsd-bench --micro                                          one layer from 1,024 to 65,536 tokens
  agentsd-bench --profile --method stock --method paper          where the time of a call goes
  agentsd-bench --table benchmarks/results/cpu-*.json            the tables of results, in Markdown
  agentsd-bench --table benchmarks/results/cpu-*.json --into docs/benchmarks.md
"""


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    from agentsd import AgentSDConfig
    from agentsd.benchmark import ARCHITECTURES, PEERS

    methods = ", ".join(("stock", "xformers", "floor", *AgentSDConfig.presets(), *PEERS))
    parser = Parser(
        prog=PROGRAM,
        description="Measure UNet calls: every method in turn in each repetition, medians, and their mean over a "
        "50-step schedule.",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--method",
        action="append",
        metavar="NAME[:KEY=VALUE,…]",
        help=f"one of {methods}; a key 0/key is of the first phase alone; repeatable (default: stock, floor and every "
        "preset)",
    )
    group.add_argument(
        "--model",
        default="sd15",
        help=f"{', '.join(ARCHITECTURES)} with random weights, or what agentsd-generate --model takes (default: sd15)",
    )
    group.add_argument(
        "--latent",
        type=_size,
        nargs="+",
        default=[64],
        metavar="CELLS",
        help="height and width of the latents; Stable Diffusion has 8 pixels to a cell (default: 64, which is 512×512)",
    )
    group.add_argument("--batch", type=whole(1), default=2, help="pictures in a call; guidance makes two (default: 2)")
    group.add_argument("--dtype", default=None, help="float32, float16 or bfloat16 (default: float16 on cuda)")
    group.add_argument("--device", default=None, help="cpu, cuda, cuda:1, … (default: the best there is)")
    group.add_argument("--compile", action="store_true", help="compile the UNet")
    group.add_argument(
        "--memory", action="store_true", help="peak memory too, each method or layer in a process of its own"
    )
    group.add_argument("--micro", action="store_true", help="single layers of 1,024 to 65,536 tokens instead")
    group.add_argument("--profile", action="store_true", help="where the time goes, of stock and ours, instead")
    group.add_argument(
        "--fused", action="store_true", help="torch's fused attention even where this package has a faster one"
    )
    group.add_argument("--repeats", type=whole(1), default=5, help="repetitions after one warm-up (default: 5)")
    group.add_argument("--threads", type=whole(1), default=None, help="threads on the CPU (default: torch's)")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=Path, metavar="FILE", help="write the measurements as JSON, and plots beside it"
    )
    group.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print the table of such files and end")
    group.add_argument(
        "--into",
        type=Path,
        metavar="FILE",
        help=f"put what --table prints into a text, between the lines {MARKS[0]} and {MARKS[1]}",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after one line about bad input, or 130 after an interrupt."""
    words = list(sys.argv[1:] if argv is None else argv)
    return command.run(
        PROGRAM,
        lambda: _run(words),
        out_of_memory="out of memory; --batch 1, a smaller --latent or --dtype float16 needs less",
    )


def _run(words: Sequence[str]) -> None:
    args = build_parser().parse_args(words)
    if args.table:
        tables = "\n\n".join(markdown(_read(path)) for path in args.table)
        if args.into:
            _write(args.into, between_marks(args.into, tables))
            print(f"wrote {args.into}")
        else:
            print(tables)
        return
    if args.into:
        raise ValueError("--into goes with --table")
    if args.output and not args.output.resolve().parent.is_dir():
        raise ValueError(f"--output is {str(args.output)!r}; its folder does not exist")
    result = _micro(args) if args.micro else _profile(args) if args.profile else _bench(args)
    print(text(result) if "runs" in result else markdown(result))
    if args.output:
        result["command"] = shlex.join([PROGRAM, *words])
        _write(args.output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {args.output}")
        if importlib.util.find_spec("matplotlib"):
            from agentsd.cli.plots import draw

            print(f"wrote {draw(result, args.output)}")
        else:
            print("no plot: matplotlib is not installed; pip install 'agentsd[bench]'", file=sys.stderr)


def _setting(args: argparse.Namespace, cells: int) -> Any:
    import torch

    from agentsd import pipelines
    from agentsd.benchmark import Setting

    device = pipelines.find_device(args.device)
    dtype = pipelines.find_dtype(args.dtype, device)
    if args.threads:
        torch.set_num_threads(args.threads)
    name = str(dtype).removeprefix("torch.")
    return Setting(args.model, (cells, cells), args.batch, name, str(device), args.compile, args.fused)


def _bench(args: argparse.Namespace) -> dict[str, Any]:
    from agentsd import AgentSDConfig
    from agentsd.benchmark import check, environment, measure, over_schedule, peak_memory

    methods = list(dict.fromkeys(args.method or ["stock", "floor", *AgentSDConfig.presets()]))
    check(methods)
    runs: list[dict[str, Any]] = []
    for cells in args.latent:
        setting = _setting(args, cells)
        timings = measure(setting, methods, args.repeats)
        memory = {method: peak_memory(setting, method) for method in methods} if args.memory else {}
        runs.append(
            {
                "setting": asdict(setting),
                "timings": [asdict(timing) for timing in timings],
                "schedule": over_schedule(timings),
                "memory": memory,
            }
        )
    return {"environment": environment(runs[0]["setting"]["device"]), "runs": runs}


def _micro(args: argparse.Namespace) -> dict[str, Any]:
    from agentsd import AgentSDConfig, Phase
    from agentsd.benchmark import MODULE, STOCK, environment, exponent, layer_memory, micro

    setting = _setting(args, 64)
    phases = {
        "agent, 256 agents": Phase(attention="agent", stride=4, max_agents=256, agent_ratio=1.0),
        "kv, 256 agents": Phase(attention="kv", stride=4, max_agents=256),
        "kv, stride 4": Phase(attention="kv", stride=4),
        "kv, stride 8": Phase(attention="kv", stride=8),
        "kv, stride 8, a k-means step": Phase(attention="kv", stride=8, kmeans_steps=1),
        "merge, stride 2": Phase(attention="merge", stride=2),
    }
    layers: dict[str, AgentSDConfig | str] = {
        "stock": STOCK,
        **{name: AgentSDConfig(phases=(phase,)) for name, phase in phases.items()},
        "agentsd.nn, 49 agents": MODULE,
    }
    tokens = [4**n for n in range(5, 9)]
    times = micro(tokens, layers, setting, args.repeats)
    result: dict[str, Any] = {
        "environment": environment(setting.device),
        "setting": asdict(setting),
        "layers": times,
        "exponents": {name: exponent(values) for name, values in times.items()},
    }
    if args.memory:
        taken = {
            name: {count: layer_memory(layer, count, setting) for count in tokens} for name, layer in layers.items()
        }
        result["memory"] = taken
        result["memory_exponents"] = {name: exponent(values) for name, values in taken.items()}
    return result


def _profile(args: argparse.Namespace) -> dict[str, Any]:
    from agentsd import AgentSDConfig
    from agentsd.benchmark import environment, profile

    methods = list(dict.fromkeys(args.method or ["stock", *AgentSDConfig.presets()]))
    setting = _setting(args, args.latent[0])
    parts = profile(setting, methods, args.repeats)
    return {"environment": environment(setting.device), "setting": asdict(setting), "parts": parts}


def rows(run: dict[str, Any]) -> list[list[str]]:
    """The table of one run: method, kind of call, share, milliseconds, ratio to stock and to the floor, memory."""
    from agentsd.benchmark import Timing

    total = run["schedule"]
    timings = [Timing(**timing) for timing in run["timings"]]

    def ratio(name: str, seconds: float) -> str:
        return f"{total[name] / seconds:.2f}×" if name in total else ""

    table = []
    for method, seconds in total.items():
        own = [timing for timing in timings if timing.method == method]
        memory = f"{run['memory'][method] / 2**30:.2f}" if method in run["memory"] else ""
        if len(own) > 1:
            table += [
                [
                    f"  {timing.kind}",
                    f"{timing.share:.0%}",
                    f"{timing.median * 1000:.0f} ± {timing.spread * 1000:.0f}",
                    ratio("stock", timing.median),
                    ratio("floor", timing.median),
                    "",
                ]
                for timing in own
            ]
        spread = f" ± {own[0].spread * 1000:.0f}" if len(own) == 1 else ""
        time = f"{seconds * 1000:.0f}{spread}"
        table.append([method, "", time, ratio("stock", seconds), ratio("floor", seconds), memory])
    return table


HEAD = ["method", "share of the steps", "ms per UNet call", "faster than stock", "of the floor's speed", "peak GiB"]


def _title(run: dict[str, Any], environment: dict[str, Any]) -> str:
    setting = run["setting"]
    height, width = setting["latent"]
    how = "compiled" if setting["compile"] else "eager"
    how += ", fused attention only" if setting.get("fused") else ""
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
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        blocks.append("\n".join([_title(run, result["environment"]), "", lines[0], "─" * len(lines[0]), *lines[1:]]))
    return "\n\n".join(blocks)


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result in Markdown, each under what was measured, and the command."""
    environment = result["environment"]
    tables: list[tuple[str, list[list[str]]]] = []
    if "layers" in result:
        setting, layers = result["setting"], result["layers"]
        tokens = list(next(iter(layers.values())))
        table = [["layer", *(f"{int(n):,} tokens, ms" for n in tokens), "exponent from 4,096"]]
        for name, times in layers.items():
            cells = [f"{seconds * 1000:.1f}" for seconds in times.values()]
            table.append([name, *cells, f"{result['exponents'][name]:.2f}"])
        what = f"one self-attention layer of SD 1.5's finest grid, batch {setting['batch']}, {setting['dtype']}"
        tables.append((f"{what}, {_machine(environment)}", table))
        if "memory" in result:
            table = [["layer", *(f"{int(n):,} tokens, MiB" for n in tokens), "exponent from 4,096"]]
            for name, sizes in result["memory"].items():
                cells = [f"{size / 2**20:.1f}" for size in sizes.values()]
                table.append([name, *cells, f"{result['memory_exponents'][name]:.2f}"])
            tables.append(("the same, memory of a call: its output and all in between", table))
    elif "psnr" in result:
        several = isinstance(result["steps"], list)
        table = [["method", *(["× stock"] if several else []), "PSNR to the stock image, mean / worst, dB"]]
        for name, decibels in result["psnr"].items():
            faster = [f"{result['speedup'][name]:.2f}×"] if several else []
            table.append([name, *faster, f"{statistics.mean(decibels):.1f} / {min(decibels):.1f}"])
        size = f", {result['size']} pixels a side" if "size" in result else ""
        steps = f"{', '.join(map(str, result['steps'])) if several else result['steps']} steps{size}"
        what = f"the embedded model, {result['prompts']} held-out prompts, {steps}, {result['dtype']}"
        tables.append((f"{what}, {_machine(environment)}", table))
    elif "parts" in result:
        table = [["ms", *next(iter(result["parts"].values())), "sum"]]
        for name, parts in result["parts"].items():
            table.append([name, *(f"{1000 * seconds:.0f}" for seconds in (*parts.values(), sum(parts.values())))])
        tables.append((_title(result, environment), table))
    else:
        tables += [(_title(run, environment), _filled(run)) for run in result["runs"]]
    command = f"```bash\n{result['command']}\n```\n\n" if "command" in result else ""
    return command + "\n\n".join(f"*{title}*\n\n{_pipes(table)}" for title, table in tables)


def between_marks(path: Path, tables: str) -> str:
    """The text of a file with `tables` between the two marks.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not have both marks.
    """
    before, start, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise ValueError(f"--into is {str(path)!r}; it must have the lines {MARKS[0]} and {MARKS[1]}")
    return f"{before}{start}\n\n{tables}\n\n{end}{after}"


def _filled(run: dict[str, Any]) -> list[list[str]]:
    """Head and rows without the columns that have nothing in them."""
    body = rows(run)
    used = [index for index in range(len(HEAD)) if any(row[index] for row in body)]
    return [[row[index] for index in used] for row in (HEAD, *body)]


def _pipes(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("  ", "– ") for cell in line) + " |" for line in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not a file of measurements: it is not JSON") from None
    if not isinstance(result, dict) or not result.keys() & {"runs", "layers", "parts", "psnr"}:
        raise ValueError(f"{path} is not a file of measurements: it has none of runs, layers, parts and psnr")
    return result


def _write(path: Path, content: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


def _size(text: str) -> int:
    if not text.isdigit() or int(text) < 8 or int(text) % 8:
        raise argparse.ArgumentTypeError(f"{text!r} must be a multiple of 8 from 8")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
