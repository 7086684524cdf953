"""The options of agentsd-generate."""

import argparse
import textwrap
from pathlib import Path
from typing import Any, NoReturn

import torch

from agentsd import AgentSDConfig, __version__, pipelines
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
        import diffusers

        print(f"agentsd {__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}")
        raise SystemExit(0)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description=textwrap.fill(DESCRIPTION, 110),
        epilog=EXAMPLES,
        formatter_class=formatter,
        argument_default=argparse.SUPPRESS,
    )

    group = parser.add_argument_group("what to draw")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="the prompt; repeat it for several")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file with one prompt on each line")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what the images should not show")
    group.add_argument(
        "--from-png",
        type=Path,
        metavar="FILE",
        help="repeat an image from the parameters in its file, bit for bit on the same machine; other options given "
        "beside it replace what is recorded",
    )

    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="MODEL", help="demo, hub id, folder or file.safetensors (default: demo)")
    group.add_argument(
        "--model-config",
        metavar="FOLDER",
        help="for a single file: the folder or hub id whose configuration and tokenizer it uses (default: found by its "
        "contents)",
    )
    group.add_argument(
        "--lora", action="append", metavar="PATH[:WEIGHT]", help="a LoRA, as safetensors file or folder; repeatable"
    )
    group.add_argument(
        "--dtype", metavar="DTYPE", help="float32, float16 or bfloat16 (default: float16 on cuda, else float32)"
    )
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps, … (default: the best there is)")
    group.add_argument(
        "--allow-pickle", action="store_true", help="load pickled weights too; they can run code of whoever made them"
    )

    group = parser.add_argument_group("acceleration")
    group.add_argument("--stock", action="store_true", help="do not accelerate")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--preset", metavar="NAME", help=f"{' or '.join(AgentSDConfig.presets())} (default: paper)")
    choice.add_argument("--config", type=Path, metavar="FILE", help="a configuration in a YAML file")
    group.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="change a field in every phase that has it (stride=8), in one phase (0/stride=8; 0 is the first) or of "
        "the step cache (steps/interval=3); repeatable",
    )
    group.add_argument(
        "--ratio",
        action="append",
        dest="set",
        type=lambda text: f"ratio={number(text)!r}",
        metavar="R",
        help="share of the tokens to merge: --set ratio=R",
    )
    group.add_argument(
        "--attention-backend",
        metavar="NAME",
        help="sdpa, xformers, sliced or a diffusers attention backend, for stock and accelerated alike (default: the "
        "model's)",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the UNet's transformer blocks with torch.compile"
    )

    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--steps", type=whole(1), metavar="N", help="denoising steps (default: 25 with the demo model, else 50)"
    )
    group.add_argument("--guidance-scale", type=number, metavar="G", help="(default: 4 with the demo model, else 7.5)")
    group.add_argument(
        "--scheduler", metavar="NAME", help=f"{', '.join(pipelines.SCHEDULERS)} (default: the model's own)"
    )
    group.add_argument(
        "--seed", type=whole(0, 2**63 - 1), metavar="N", help="image number i starts from seed + i (default: 0)"
    )
    group.add_argument("--height", type=whole(1), metavar="PIXELS", help="(default: what the model was made for)")
    group.add_argument("--width", type=whole(1), metavar="PIXELS", help="(default: what the model was made for)")
    group.add_argument("--num-images", type=whole(1), metavar="N", help="images for each prompt (default: 1)")
    group.add_argument("--batch-size", type=whole(1), metavar="N", help="images made at once (default: 1)")

    group = parser.add_argument_group("starting from an image")
    group.add_argument(
        "--init-image",
        type=Path,
        metavar="FILE",
        help="change this image; its size is the default of --width, --height",
    )
    group.add_argument(
        "--strength",
        type=_share,
        metavar="S",
        help="how much of it to change, above 0 up to 1 (default: 0.8, with a mask 1)",
    )
    group.add_argument(
        "--mask", type=Path, metavar="FILE", help="change only what is white in this picture; the rest stays as it is"
    )

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="a folder for numbered names, or one .png file that does not exist yet (default: outputs)",
    )
    group.add_argument(
        "--compare",
        action="store_true",
        help="make each image stock and accelerated; write both and one picture with both, their difference and times",
    )
    group.add_argument("--quiet", action="store_true", help="print the names of the files and nothing else")
    group.add_argument("--version", action=_Version, nargs=0, help="print the versions and exit")
    return parser


def _share(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return value
