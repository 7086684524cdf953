"""agentsd-tune: the configuration for a speed-up or an error, found by measuring on a model."""

import argparse
import importlib.util
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from agentsd.cli import command
from agentsd.cli.command import Parser, formatter, number, whole

PROGRAM = "agentsd-tune"
PROMPTS = (
    "a photo of an astronaut riding a horse on mars",
    "a bowl of fruit on a wooden table, oil painting",
    "portrait of an old fisherman, detailed face, soft light",
    "a street in a small town at night after rain",
)
EXAMPLES = """examples:
  agentsd-tune --target-speedup 1.5 --steps 25 -o tuned.yaml                        the embedded model
  agentsd-tune --model stable-diffusion-v1-5/stable-diffusion-v1-5 --target-speedup 2 --compare -o tuned.yaml
  agentsd-tune --model folder-or-file.safetensors --max-error 0.02 --prompts prompts.txt -o tuned.yaml
  agentsd-generate --config tuned.yaml --prompt "a large red circle on the left"

The error is the root-mean-square error of the images against the stock images of the same seeds, on a scale from 0 to
1; 0.01 is a PSNR of 40 dB. The same command resumes an interrupted run.
"""


def build_parser() -> argparse.ArgumentParser:
    from agentsd import AgentSDConfig

    description = "Measure what each setting costs on a model and on this machine, and write the best configuration."
    parser = Parser(prog=PROGRAM, description=description, epilog=EXAMPLES, formatter_class=formatter)
    group = parser.add_argument_group("target")
    target = group.add_mutually_exclusive_group(required=True)
    speedup = "whole images so many times as fast as stock, with the smallest error"
    target.add_argument("--target-speedup", type=float, metavar="S", help=speedup)
    target.add_argument("--max-error", type=float, metavar="E", help="the fastest configuration within this error")
    group = parser.add_argument_group("what to measure on")
    group.add_argument("--model", default="demo", help="what agentsd-generate --model takes (default: demo)")
    group.add_argument("--dtype", help="float32, float16 or bfloat16 (default: float16 on cuda)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the best there is)")
    group.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with one prompt on each line")
    group.add_argument("--steps", type=whole(1), default=50, metavar="N", help="denoising steps (default: 50)")
    group.add_argument("--guidance-scale", type=number, metavar="G", help="(default: 4 with the demo model, else 7.5)")
    for option in ("--height", "--width"):
        group.add_argument(option, type=whole(1), metavar="PIXELS", help="(default: what the model was made for)")
    repeats = "UNet calls of each part of the schedule, and prompts, to measure settings on (default: 2)"
    group.add_argument("--repeats", type=whole(1), default=2, metavar="N", help=repeats)
    presets = f"measure {', '.join(AgentSDConfig.presets())} too, for the plot"
    group.add_argument("--compare", action="store_true", help=presets)
    group = parser.add_argument_group("output")
    output = "the configuration; the measurements are written beside it as .json, and a plot as .png"
    group.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.yaml", help=output)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    return command.run(
        PROGRAM,
        lambda: _tune(words),
        interrupted=lambda: "interrupted; the same command resumes",
        out_of_memory="out of memory; what is measured is kept; --dtype float16 needs less",
    )


def _check(args: argparse.Namespace) -> None:
    if args.target_speedup is not None and not 1 <= args.target_speedup < float("inf"):
        raise ValueError(f"--target-speedup is {args.target_speedup:g}; it must be a number from 1")
    if args.max_error is not None and not 0 < args.max_error <= 1:
        raise ValueError(f"--max-error is {args.max_error:g}; it must be a number above 0, at most 1")
    if args.output.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--output is {str(args.output)!r}; it must end in .yaml")
    if not args.output.resolve().parent.is_dir():
        raise ValueError(f"--output is {str(args.output)!r}; its folder does not exist")


def _prompts(args: argparse.Namespace) -> list[str]:
    from agentsd.demo.scenes import held_out_prompts
    from agentsd.generate.request import read_prompts

    if args.prompts:
        return read_prompts("--prompts", args.prompts)
    # Not those that scripts/experiments/closeness.py checks with.
    return held_out_prompts(len(PROMPTS), seed=2) if args.model == "demo" else list(PROMPTS)


def _tune(argv: Sequence[str]) -> None:
    args, words = build_parser().parse_args(argv), shlex.join([PROGRAM, *argv])
    _check(args)
    import agentsd
    from agentsd import AgentSDConfig, AgentSDWarning, pipelines, results
    from agentsd.tune import Measurements, Target, Tuner, Verified
    from agentsd.tune.plots import draw_front

    # The error is measured, and whole images decide.
    warnings.filterwarnings("ignore", "interval of steps", AgentSDWarning)
    prompts = _prompts(args)
    device = pipelines.find_device(args.device)
    dtype = pipelines.find_dtype(args.dtype, device)
    guidance = args.guidance_scale
    if guidance is None:
        guidance = 4.0 if args.model == "demo" else 7.5
    call = {"num_inference_steps": args.steps, "guidance_scale": guidance, "height": args.height, "width": args.width}
    environment = results.environment(str(device))
    settings = {
        "model": args.model,
        "dtype": str(dtype).removeprefix("torch."),
        **{key: environment[key] for key in ("device", "threads", "torch", "diffusers")},
        "agentsd": agentsd.__version__,
        "prompts": prompts,
        "call": call,
        "repeats": args.repeats,
    }
    measurements = Measurements(args.output.with_suffix(".json"), settings)
    pipe = pipelines.load(args.model, device=device, dtype=dtype)
    presets = {name: AgentSDConfig.from_preset(name) for name in AgentSDConfig.presets()} if args.compare else {}
    target = Target(args.target_speedup, args.max_error)
    try:
        tuner = Tuner(pipe, prompts, call, measurements, args.repeats)
        best, verified = tuner.tune(target)
        figures = tuner.measure(presets) if presets else {}
    finally:
        measurements.bar.close()
    verified += [Verified(name, presets[name], None, *pair) for name, pair in figures.items()]
    result = tuner.result(target, best, verified)
    measurements.write(command=words, result=result)
    assert best.predicted is not None
    about = f"model {args.model}, {settings['dtype']}, {args.steps} steps, {len(prompts)} prompts"
    comments = [
        f"Found by agentsd {agentsd.__version__}: {words}",
        f"{about}, {results.machine(environment)}",
        f"predicted: {best.predicted[0]:.2f} times as fast as stock, error {best.predicted[1]:.4f}",
        f"measured: {best}",
        "The error is the root-mean-square error against the stock images of the same seeds, from 0 to 1.",
    ]
    results.write_text(args.output, "".join(f"# {line}\n" for line in comments) + best.config.to_yaml())
    for one in verified:
        predicted = f", predicted {one.predicted[0]:.2f} and {one.predicted[1]:.4f}" if one.predicted else ""
        print(f"{'→' if one is best else ' '} {one.name}: {one}{predicted}")
    print(f"wrote {args.output} and {measurements.path}")
    if importlib.util.find_spec("matplotlib"):
        draw_front(result, picture := args.output.with_suffix(".png"))
        print(f"wrote {picture}")
    else:
        print("no plot: matplotlib is not installed; pip install 'agentsd[bench]'", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
