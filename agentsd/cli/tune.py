"""agentsd-tune: the configuration for a speed-up or an error, found by measuring on a model."""

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from agentsd.tuning import Verified

PROGRAM = "agentsd-tune"
EXAMPLES = """examples:
  agentsd-tune --target-speedup 1.5 --steps 25 -o tuned.yaml                        the embedded model
  agentsd-tune --model stable-diffusion-v1-5/stable-diffusion-v1-5 --target-speedup 2 --compare -o tuned.yaml
  agentsd-tune --model folder-or-file.safetensors --max-error 0.02 --prompts prompts.txt -o tuned.yaml
  agentsd-generate --config tuned.yaml --prompt "a large red circle on the left"

The error is the root-mean-square error of the images against the stock images of the same seeds, on a scale from 0 to
1; 0.01 is a PSNR of 40 dB. A run that was interrupted goes on where it was when the same command is given again.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {PROGRAM} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    from agentsd import AgentSDConfig

    parser = _Parser(
        prog=PROGRAM,
        description="Measure what each setting costs on a model and on this machine, and write the best configuration.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=110),
    )
    group = parser.add_argument_group("target")
    target = group.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--target-speedup", type=float, metavar="S", help="whole images so many times as fast, with the smallest error"
    )
    target.add_argument("--max-error", type=float, metavar="E", help="the fastest whose images err so much at most")
    group = parser.add_argument_group("what to measure on")
    group.add_argument("--model", default="demo", help="what agentsd-generate --model takes (default: demo)")
    group.add_argument("--dtype", default=None, help="float32, float16 or bfloat16 (default: float16 on cuda)")
    group.add_argument("--device", default=None, help="cpu, cuda, cuda:1, … (default: the best there is)")
    group.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with one prompt on each line")
    group.add_argument("--steps", type=_positive, default=50, metavar="N", help="denoising steps (default: 50)")
    group.add_argument("--guidance-scale", type=float, metavar="G", help="(default: 4 with the demo model, else 7.5)")
    group.add_argument("--height", type=_positive, metavar="PIXELS", help="(default: what the model was made for)")
    group.add_argument("--width", type=_positive, metavar="PIXELS", help="(default: what the model was made for)")
    group.add_argument(
        "--repeats",
        type=_positive,
        default=2,
        metavar="N",
        help="UNet calls of each part of the schedule, and prompts, on which settings are measured (default: 2)",
    )
    group.add_argument(
        "--compare", action="store_true", help=f"measure {', '.join(AgentSDConfig.presets())} too, for the plot"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE.yaml",
        help="the configuration; the measurements are written beside it as .json, and a plot as .png",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        args = build_parser().parse_args(argv)
        _check(args)
        _tune(args, shlex.join([PROGRAM, *(sys.argv[1:] if argv is None else argv)]))
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


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
    from agentsd.demo.accuracy import held_out_prompts
    from agentsd.tuning import PROMPTS

    if args.prompts is None:
        # Not those that scripts/check_closeness.py checks with.
        return held_out_prompts(len(PROMPTS), seed=2) if args.model == "demo" else list(PROMPTS)
    try:
        lines = args.prompts.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {args.prompts} is not text in UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {args.prompts} holds no prompt")
    return prompts


def _tune(args: argparse.Namespace, command: str) -> None:
    import agentsd
    from agentsd import AgentSDConfig, pipelines
    from agentsd.benchmark import environment
    from agentsd.tuning import Measurements, Tuner, Verified, write_config

    prompts = _prompts(args)
    device = pipelines.find_device(args.device)
    dtype = pipelines.find_dtype(args.dtype, device)
    guidance = args.guidance_scale
    if guidance is None:
        guidance = 4.0 if args.model == "demo" else 7.5
    call = {"num_inference_steps": args.steps, "guidance_scale": guidance, "height": args.height, "width": args.width}
    about = {key: environment(str(device))[key] for key in ("device", "threads", "torch", "diffusers")}
    settings = {
        "model": args.model,
        "dtype": str(dtype).removeprefix("torch."),
        **about,
        "agentsd": agentsd.__version__,
        "prompts": prompts,
        "call": call,
        "repeats": args.repeats,
    }
    measurements = Measurements(args.output.with_suffix(".json"), settings)
    pipe = pipelines.load(args.model, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    tuner = Tuner(pipe, prompts, call, measurements, args.repeats)
    best, verified = tuner.tune(args.target_speedup, args.max_error)
    presets = {name: AgentSDConfig.from_preset(name) for name in AgentSDConfig.presets()} if args.compare else {}
    compared = (
        [Verified(n, presets[n], None, *result) for n, result in tuner.verify(presets).items()] if presets else []
    )
    measurements.bar.close()
    target = {"speedup": args.target_speedup, "error": args.max_error}
    result = {
        "target": target,
        "front": [[tuner.speedup(point), point.error**0.5, point.choice] for point in tuner.front],
        "verified": [one.to_dict() for one in (*verified, *compared)],
        "chosen": best.name,
    }
    measurements.write(command=command, result=result)
    assert best.predicted is not None
    faster, error = best.predicted
    machine = f"{about['device']}, {about['threads']} threads, torch {about['torch']}, diffusers {about['diffusers']}"
    write_config(
        best.config,
        args.output,
        [
            f"Found by agentsd {agentsd.__version__}: {command}",
            f"model {args.model}, {settings['dtype']}, {args.steps} steps, {len(prompts)} prompts, {machine}",
            f"predicted: {faster:.2f} times as fast as stock, error {error:.4f}",
            f"measured: {_figures(best)}",
            "The error is the root-mean-square error against the stock images of the same seeds, from 0 to 1.",
        ],
    )
    _print(best, verified, compared)
    print(f"wrote {args.output} and {measurements.path}")
    if importlib.util.find_spec("matplotlib"):
        from agentsd.cli.plots import draw_front

        print(f"wrote {draw_front(result, args.output)}")
    else:
        print("no plot: matplotlib is not installed; pip install 'agentsd[bench]'", file=sys.stderr)


def _figures(one: "Verified") -> str:
    from agentsd.tuning import decibels

    return f"{one.speedup:.2f} times as fast as stock, error {one.error:.4f} ({decibels(one.error):.1f} dB)"


def _print(best: "Verified", verified: "Sequence[Verified]", compared: "Sequence[Verified]") -> None:
    for one in (*verified, *compared):
        faster, error = one.predicted or (None, None)
        guess = f", predicted {faster:.2f} and {error:.4f}" if faster is not None else ""
        print(f"{'→' if one is best else ' '} {one.name}: {_figures(one)}{guess}")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
