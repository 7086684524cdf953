"""agentsd-ui: a web page that draws one prompt stock and accelerated."""

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

PROGRAM = "agentsd-ui"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {PROGRAM} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = _Parser(
        prog=PROGRAM,
        description="Serve a web page that draws one prompt stock and accelerated, side by side. Without --model, the "
        "small model that ships with the package draws coloured shapes, offline.",
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="MODEL",
        help="demo, hub id, folder or file.safetensors that visitors may choose; repeatable (default: demo)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument("--port", type=_whole(1, 65535), default=7860, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/ui"),
        metavar="FOLDER",
        help="where images go; its files are served (default: %(default)s)",
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16 (default: float16 on cuda)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, mps, … (default: the best there is)")
    parser.add_argument(
        "--max-side",
        type=_whole(64, 8192),
        default=1024,
        metavar="PIXELS",
        help="largest width and height (default: 1024)",
    )
    parser.add_argument(
        "--max-steps", type=_whole(1, 1000), default=100, metavar="N", help="most denoising steps (default: 100)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when it is interrupted, or 2 after one line about bad input."""
    try:
        arguments = build_parser().parse_args(argv)
        if importlib.util.find_spec("gradio") is None:
            raise ValueError("the web page needs the package gradio, which is not installed: pip install 'agentsd[ui]'")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _serve(arguments)
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _serve(arguments: argparse.Namespace) -> None:
    from agentsd.ui.page import serve
    from agentsd.ui.studio import Limits, Studio

    studio = Studio(
        arguments.model or ["demo"],
        arguments.output,
        Limits(side=arguments.max_side, steps=arguments.max_steps),
        dtype=arguments.dtype,
        device=arguments.device,
    )
    page, address = serve(studio, arguments.host, arguments.port)
    print(f"{PROGRAM}: {address} (Ctrl+C stops it); images go to {studio.output.folder}", flush=True)
    try:
        page.block_thread()
    finally:
        page.close()


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return int(text)

    return read


if __name__ == "__main__":
    sys.exit(main())
