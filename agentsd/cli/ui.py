"""agentsd-ui: a web page that draws one prompt stock and accelerated."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from agentsd.cli import command
from agentsd.cli.command import Parser, whole

PROGRAM = "agentsd-ui"


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(
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
    parser.add_argument("--port", type=whole(1, 65535), default=7860, metavar="N", help="(default: %(default)s)")
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
        type=whole(64, 8192),
        default=1024,
        metavar="PIXELS",
        help="largest width and height (default: 1024)",
    )
    parser.add_argument(
        "--max-steps", type=whole(1, 1000), default=100, metavar="N", help="most denoising steps (default: 100)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when it has served, 130 if interrupted before, or 2 after one line about bad input."""
    return command.run(PROGRAM, lambda: _serve(build_parser().parse_args(argv)))


def _serve(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the web page needs the package gradio, which is not installed: pip install 'agentsd[ui]'")
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


if __name__ == "__main__":
    raise SystemExit(main())
