"""agentsd-generate: a prompt becomes a picture, stock or accelerated."""

import argparse
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from agentsd.cli import command
from agentsd.cli.command import Parser, formatter, number, whole

PROGRAM = "agentsd-generate"
ANY_MODEL = "--model takes any Stable Diffusion: a hub id, a folder in the diffusers layout or a .safetensors file."
DESCRIPTION = (
    "Make images from text with Stable Diffusion accelerated by AgentSD. Without --model, the small model that ships "
    f"with the package draws coloured shapes, offline. {ANY_MODEL}"
)
EXAMPLES = """examples:
  agentsd-generate --prompt "a large red circle on the left and a small blue star on the right"
  agentsd-generate --prompt "a photo of an astronaut" --model org/name --ratio 0.5 --compare
  agentsd-generate --prompt "a black ring" --set attention=kv --set 0/stride=4 --set 1/stride=2
  agentsd-generate --from-png outputs/agentsd-0001.png --stock
"""


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> NoReturn:
        from agentsd import __version__
        from agentsd.generate.metadata import versions

        print(", ".join(f"{name} {version}" for name, version in {"agentsd": __version__, **versions()}.items()))
        raise SystemExit(0)


def build_parser() -> argparse.ArgumentParser:
    from agentsd import AgentSDConfig, pipelines

    parser = Parser(PROGRAM, epilog=EXAMPLES, formatter_class=formatter, argument_default=argparse.SUPPRESS)
    parser.description = textwrap.fill(DESCRIPTION, 110)
    group = parser.add_argument_group("what to draw")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="the prompt; repeat it for several")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file with one prompt on each line")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what the images should not show")
    from_png = (
        "repeat an image from the parameters in its file, bit for bit on the same machine; other options given beside "
        "it replace what is recorded"
    )
    group.add_argument("--from-png", type=Path, metavar="FILE", help=from_png)
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="MODEL", help="demo, hub id, folder or file.safetensors (default: demo)")
    config = "whose configuration and tokenizer it uses (default: found by its contents)"
    group.add_argument("--model-config", metavar="FOLDER", help=f"for a single file: the folder or hub id {config}")
    lora = "a LoRA, as safetensors file or folder; repeatable"
    group.add_argument("--lora", action="append", metavar="PATH[:WEIGHT]", help=lora)
    dtype = "float32, float16 or bfloat16 (default: float16 on cuda, else float32)"
    group.add_argument("--dtype", metavar="DTYPE", help=dtype)
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps, … (default: the best there is)")
    pickled = "load pickled weights too; they can run code of whoever made them"
    group.add_argument("--allow-pickle", action="store_true", help=pickled)
    group = parser.add_argument_group("acceleration")
    group.add_argument("--stock", action="store_true", help="do not accelerate")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--preset", metavar="NAME", help=f"{' or '.join(AgentSDConfig.presets())} (default: paper)")
    choice.add_argument("--config", type=Path, metavar="FILE", help="a configuration in a YAML file")
    fields = (
        "change a field in every phase that has it (stride=8), in one phase (0/stride=8; 0 is the first) or of the "
        "step cache (steps/interval=3); repeatable"
    )
    group.add_argument("--set", action="append", metavar="KEY=VALUE", help=fields)
    ratio = "share of the tokens to merge: --set ratio=R"
    group.add_argument("--ratio", action="append", dest="set", type=_ratio, metavar="R", help=ratio)
    backends = "sdpa, xformers, sliced or a diffusers attention backend, for stock and accelerated alike"
    group.add_argument("--attention-backend", metavar="NAME", help=f"{backends} (default: the model's)")
    compiled = "compile the UNet's transformer blocks with torch.compile"
    group.add_argument("--compile", action="store_true", help=compiled)
    group = parser.add_argument_group("sampling")
    steps = "denoising steps (default: 25 with the demo model, else 50)"
    group.add_argument("--steps", type=whole(1), metavar="N", help=steps)
    group.add_argument("--guidance-scale", type=number, metavar="G", help="(default: 4 with the demo model, else 7.5)")
    schedulers = f"{', '.join(pipelines.SCHEDULERS)} (default: the model's own)"
    group.add_argument("--scheduler", metavar="NAME", help=schedulers)
    seed = "image number i starts from seed + i (default: 0)"
    group.add_argument("--seed", type=whole(0, 2**63 - 1), metavar="N", help=seed)
    for option in ("--height", "--width"):
        group.add_argument(option, type=whole(1), metavar="PIXELS", help="(default: what the model was made for)")
    group.add_argument("--num-images", type=whole(1), metavar="N", help="images for each prompt (default: 1)")
    group.add_argument("--batch-size", type=whole(1), metavar="N", help="images made at once (default: 1)")
    group = parser.add_argument_group("starting from an image")
    image = "change this image; its size is the default of --width, --height"
    group.add_argument("--init-image", type=Path, metavar="FILE", help=image)
    strength = "how much of it to change, above 0 up to 1 (default: 0.8, with a mask 1)"
    group.add_argument("--strength", type=_share, metavar="S", help=strength)
    mask = "change only what is white in this picture; the rest stays as it is"
    group.add_argument("--mask", type=Path, metavar="FILE", help=mask)
    group = parser.add_argument_group("output")
    output = "a folder for numbered names, or one .png file that does not exist yet (default: outputs)"
    group.add_argument("--output", type=Path, metavar="PATH", help=output)
    compare = "make each image stock and accelerated; write both and one picture with both, their difference and times"
    group.add_argument("--compare", action="store_true", help=compare)
    group.add_argument("--quiet", action="store_true", help="print the names of the files and nothing else")
    group.add_argument("--version", action=_Version, nargs=0, help="print the versions and exit")
    return parser


def _ratio(text: str) -> str:
    return f"ratio={number(text)!r}"


def _share(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    finished: list[Path] = []
    return command.run(
        PROGRAM,
        lambda: _generate(vars(build_parser().parse_args(argv)), finished),
        interrupted=lambda: f"interrupted; images finished: {len(finished)}",
        out_of_memory="out of memory; a smaller --width and --height, --batch-size 1 or --dtype float16 need less",
    )


def _generate(given: dict[str, Any], finished: list[Path]) -> None:
    from agentsd import describe
    from agentsd.generate.request import check
    from agentsd.generate.run import Run, threads

    command.quieten()
    plan = check(given)
    quiet = plan.settings.quiet
    started = time.perf_counter()
    run = Run(plan)
    if not quiet:
        print(f"{run.summary}; loaded in {time.perf_counter() - started:.1f} s", flush=True)
    with threads(plan.settings.threads):
        for paths, line in run.comparisons() if plan.settings.compare else run.images():
            finished.append(paths[0])
            print(*(paths if quiet else [f"{paths[0]}: {line}"]), sep="\n", flush=True)
    if not quiet:
        print("nothing is accelerated" if plan.config is None else describe(run.pipe))
        if plan.settings.model == "demo":
            print(ANY_MODEL)


if __name__ == "__main__":
    raise SystemExit(main())
