"""agentsd-ui: a web page that draws one prompt stock and accelerated."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from agentsd.cli import command
from agentsd.cli.command import Parser, whole

PROGRAM = "agentsd-ui"
DESCRIPTION = (
    "Serve a web page that draws one prompt stock and accelerated, side by side. Without --model, the small model that "
    "ships with the package draws coloured shapes, offline."
)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(PROGRAM, description=DESCRIPTION)
    model = "demo, hub id, folder or file.safetensors that visitors may choose; repeatable (default: demo)"
    parser.add_argument("--model", action="append", metavar="MODEL", help=model)
    host = "address to listen on (default: %(default)s)"
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help=host)
    parser.add_argument("--port", type=whole(1, 65535), default=7860, metavar="N", help="(default: %(default)s)")
    output = "where images go; its files are served (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("outputs/ui"), metavar="FOLDER", help=output)
    parser.add_argument("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16 (default: float16 on cuda)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, mps, … (default: the best there is)")
    side = "largest width and height (default: 1024)"
    parser.add_argument("--max-side", type=whole(64, 8192), default=1024, metavar="PIXELS", help=side)
    steps = "most denoising steps (default: 100)"
    parser.add_argument("--max-steps", type=whole(1, 1000), default=100, metavar="N", help=steps)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(PROGRAM, lambda: _serve(build_parser().parse_args(argv)))


def _serve(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the web page needs the package gradio, which is not installed: pip install 'agentsd[ui]'")
    from agentsd.ui.page import serve
    from agentsd.ui.studio import Limits, Studio

    limits = Limits(side=args.max_side, steps=args.max_steps)
    studio = Studio(args.model or ["demo"], args.output, limits, dtype=args.dtype, device=args.device)
    page, address = serve(studio, args.host, args.port)
    print(f"{PROGRAM}: {address} (Ctrl+C stops it); images go to {studio.output.folder}", flush=True)
    try:
        page.block_thread()
    finally:
        page.close()


if __name__ == "__main__":
    raise SystemExit(main())
