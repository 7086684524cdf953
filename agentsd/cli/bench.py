"""agentsd-bench: time and memory of the UNet, stock beside accelerated beside the peers."""

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agentsd.cli import command
from agentsd.cli.command import Parser, formatter, whole

PROGRAM = "agentsd-bench"
EXAMPLES = """examples:
  agentsd-bench                                                  stock, the floor and every preset on SD 1.5, 512×512
  agentsd-bench --method stock --method paper:ratio=0.5 --method tomesd:ratio=0.5 --latent 64 96 128
  agentsd-bench --model demo --memory
  agentsd-bench --micro                                          one layer from 1,024 to 65,536 tokens
  agentsd-bench --profile --method stock --method paper          where the time of a call goes
  agentsd-bench --launches --method stock --method turbo         the operations of each kind of call
  agentsd-bench --table benchmarks/results/cpu-*.json            the tables of results, in Markdown
  agentsd-bench --table benchmarks/results/cpu-*.json --into docs/benchmarks.md
"""


def build_parser() -> argparse.ArgumentParser:
    from agentsd import AgentSDConfig
    from agentsd.bench.architectures import ARCHITECTURES
    from agentsd.methods import PEERS

    description = (
        "Measure UNet calls: every method in turn in each repetition, medians, and their mean over a 50-step schedule."
    )
    parser = Parser(prog=PROGRAM, description=description, epilog=EXAMPLES, formatter_class=formatter)
    group = parser.add_argument_group("what to measure")
    method = (
        f"one of {', '.join(('stock', 'xformers', 'floor', *AgentSDConfig.presets(), *PEERS))}, or a YAML file; a key "
        "0/key is of the first phase alone; floor:of=fast leaves out the self-attention that fast covers; repeatable "
        "(default: stock, every preset and their floors)"
    )
    group.add_argument("--method", action="append", metavar="NAME[:KEY=VALUE,…]", help=method)
    model = f"{', '.join(ARCHITECTURES)} with random weights, or what agentsd-generate --model takes (default: sd15)"
    group.add_argument("--model", default="sd15", help=model)
    latent = "height and width of the latents; Stable Diffusion has 8 pixels to a cell (default: 64, which is 512×512)"
    group.add_argument("--latent", type=_size, nargs="+", default=[64], metavar="CELLS", help=latent)
    group.add_argument("--batch", type=whole(1), default=2, help="pictures in a call; guidance makes two (default: 2)")
    group.add_argument("--dtype", help="float32, float16 or bfloat16 (default: float16 on cuda)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the best there is)")
    group.add_argument("--compile", action="store_true", help="compile the UNet")
    group.add_argument("--memory", action="store_true", help="peak memory too, each method or layer in a process alone")
    group.add_argument("--micro", action="store_true", help="single layers of 1,024 to 65,536 tokens instead")
    group.add_argument("--profile", action="store_true", help="where the time goes, of stock and ours, instead")
    group.add_argument("--launches", action="store_true", help="the number of operations of a call instead")
    group.add_argument("--fused", action="store_true", help="torch's fused attention even where ours is faster")
    group.add_argument("--repeats", type=whole(1), default=5, help="repetitions after one warm-up (default: 5)")
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, metavar="FILE", help="write measurements as JSON, and plots beside it")
    group.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print the table of such files and end")
    into = "put what --table prints into a document, between <!-- agentsd-bench --> and <!-- /agentsd-bench -->"
    group.add_argument("--into", type=Path, metavar="FILE", help=into)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    out_of_memory = "out of memory; --batch 1, a smaller --latent or --dtype float16 needs less"
    return command.run(PROGRAM, lambda: _run(words), out_of_memory=out_of_memory)


def _run(words: Sequence[str]) -> None:
    args = build_parser().parse_args(words)
    command.quieten()
    from agentsd import results
    from agentsd.bench import plots, tables

    if args.table:
        text = "\n\n".join(tables.markdown(tables.read(path)) for path in args.table)
        if args.into:
            results.put_between(args.into, PROGRAM, text)
        print(f"wrote {args.into}" if args.into else text)
        return
    if args.into:
        raise ValueError("--into goes with --table")
    if args.output and not args.output.resolve().parent.is_dir():
        raise ValueError(f"--output is {str(args.output)!r}; its folder does not exist")
    result = _measured(args)
    print(tables.text(result))
    if not args.output:
        return
    result["command"] = shlex.join([PROGRAM, *words])
    results.write_json(args.output, result)
    print(f"wrote {args.output}")
    if "launches" in result:
        return
    if importlib.util.find_spec("matplotlib"):
        print(f"wrote {plots.draw(result, args.output)}")
    else:
        print("no plot: matplotlib is not installed; pip install 'agentsd[bench]'", file=sys.stderr)


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    from agentsd import AgentSDConfig, pipelines
    from agentsd.bench import layers, memory
    from agentsd.bench.architectures import Setting
    from agentsd.bench.latency import measure, over_schedule
    from agentsd.bench.profile import launches, profile
    from agentsd.results import environment

    device = pipelines.find_device(args.device)
    dtype = str(pipelines.find_dtype(args.dtype, device)).removeprefix("torch.")
    fixed = args.batch, dtype, str(device), args.compile, args.fused
    settings = [Setting(args.model, (cells, cells), *fixed) for cells in args.latent]
    setting, presets = settings[0], AgentSDConfig.presets()
    about = {"environment": environment(str(device)), "setting": asdict(setting)}
    if args.micro:
        about["layers"] = layers.measure_layers(layers.TOKENS, layers.LAYERS, setting, args.repeats)
        if args.memory:
            about["memory"] = {
                name: {count: memory.layer_memory(layer, count, setting) for count in layers.TOKENS}
                for name, layer in layers.LAYERS.items()
            }
        return about
    if args.profile:
        return about | {"parts": profile(setting, args.method or ["stock", *presets], args.repeats)}
    if args.launches:
        return about | {"launches": launches(setting, args.method or ["stock", *presets])}
    methods = list(dict.fromkeys(args.method or ["stock", "floor:of=paper", "floor:of=fast", *presets]))
    runs = []
    for setting in settings:
        timings = measure(setting, methods, args.repeats)
        run = {"setting": asdict(setting), "timings": [asdict(timing) for timing in timings]}
        peaks = {one: memory.peak_memory(setting, one) for one in methods} if args.memory else {}
        runs.append(run | {"schedule": over_schedule(timings), "memory": peaks})
    return {"environment": about["environment"], "runs": runs}


def _size(text: str) -> int:
    if not text.isdigit() or int(text) < 8 or int(text) % 8:
        raise argparse.ArgumentTypeError(f"{text!r} must be a multiple of 8 from 8")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
