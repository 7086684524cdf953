"""agentsd-eval: images of every method, their scores and one report."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentsd.cli import command
from agentsd.cli.command import Parser, formatter, whole

if TYPE_CHECKING:
    from agentsd.evaluation.generation import Run
    from agentsd.evaluation.protocols import Protocol, Scores
    from agentsd.evaluation.scorer import Scorer

PROGRAM = "agentsd-eval"
MAKE = ("limit", "captions", "model_config", "allow_pickle", "device", "threads", "quiet")  # arguments of run.make
EXAMPLES = """examples:
  agentsd-eval run --protocol demo --limit 64
  agentsd-eval run --protocol paper --model stable-diffusion-v1-5/stable-diffusion-v1-5 --reference ILSVRC2012/val
  accelerate launch --num_processes 8 -m agentsd.cli.evaluate generate --protocol tomesd --model FOLDER
  agentsd-eval score --images stock=FOLDER --images mine=FOLDER --reference FOLDER
  agentsd-eval report runs/demo

A run that was interrupted resumes when the same command is given again.
"""


def build_parser() -> argparse.ArgumentParser:
    """The options of every subcommand."""
    from agentsd.evaluation.protocols import NETWORKS, PAIRS, names

    about = "Measure what an acceleration does to the images."
    parser = Parser(prog=PROGRAM, description=about, epilog=EXAMPLES, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    files: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    numbers: dict[str, Any] = {"type": whole(1), "metavar": "N"}

    what = Parser(add_help=False)
    add = what.add_argument_group("what to make").add_argument
    every = f"{', '.join(names())}, or a .yaml file (default: demo)"
    add("--protocol", default="demo", metavar="NAME|FILE", help=every)
    some = "these instead of the protocol's: stock, a preset or a peer; repeatable"
    add("--method", action="append", metavar="NAME[:KEY=VALUE,…]", help=some)
    add("--steps", **numbers, help="denoising steps (default: the protocol's)")
    add("--captions", **files, help="for protocols that draw captions: .json of COCO, .tsv or .txt")
    add = what.add_argument_group("model").add_argument
    add("--model", metavar="MODEL", help="what agentsd-generate --model takes (default: the protocol's)")
    add("--model-config", metavar="FOLDER", help="for a single file: where its configuration is")
    add("--allow-pickle", action="store_true", help="load pickled weights too")
    add("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16 (default: the protocol's)")
    add("--batch-size", **numbers, help="images made at once (default: the protocol's)")
    add("--threads", **numbers, default=1, help="of each process on a CPU; the images depend on them (default: 1)")

    where = Parser(add_help=False)
    add = where.add_argument_group("run").add_argument
    add("--limit", **numbers, help="only the first N images of each method")
    add("--output", type=Path, metavar="FOLDER", help="of the run (default: runs/PROTOCOL)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, … (default: the best there is)")
    add("--quiet", action="store_true", help="no progress bars")

    how = Parser(add_help=False)
    add = how.add_argument_group("scores").add_argument
    real = "real images, or their mean and covariance as pytorch-fid saves them"
    add("--reference", type=Path, metavar="FOLDER|FILE.npz", help=real)
    add("--inception-weights", **files, help="FID's Inception (default: torch-fidelity's download)")
    add("--lpips-weights", **files, help="torchvision's weights of LPIPS's network (default: its download)")
    add("--clip", metavar="FOLDER|ID", help="CLIP for transformers (default: the protocol's)")
    add("--dinov2", metavar="FOLDER|ID", help="DINOv2 for transformers (default: the protocol's)")
    add("--features", nargs="*", metavar="NAME", help=f"{', '.join(NETWORKS)} instead of the protocol's")
    add("--pairs", nargs="*", metavar="NAME", help=f"{', '.join(PAIRS)} instead of the protocol's")
    add("--allow-singular", action="store_true", help="Fréchet distances of fewer images than features too")
    add("--bootstrap", **numbers, help="resamples behind the intervals (default: the protocol's)")
    add("--cache", type=Path, metavar="FOLDER", help="of features, by the hash of images (default: ~/.cache/agentsd)")

    def subcommand(work: Callable[..., None], text: str, *parents: Parser) -> Callable[..., Any]:
        options: Any = {"help": text, "description": f"{text[0].upper()}{text[1:]}.", "formatter_class": formatter}
        parser = commands.add_parser(work.__name__[1:], parents=parents, **options)
        parser.set_defaults(work=work)
        return parser.add_argument

    subcommand(_run, "generate, score and report", what, where, how)
    subcommand(_generate, "make the images; what is finished is kept", what, where)
    add = subcommand(_score, "score the images of a run, or folders of images", where, how)
    add("run", nargs="?", type=Path, metavar="RUN", help="folder of a run (default: --output)")
    folders = "folders instead of a run, pictures in the order of their names; the first is stock; repeatable"
    add("--images", action="append", metavar="NAME=FOLDER", help=folders)
    add = subcommand(_report, "write the report of a results.json again, or print its table")
    add("results", nargs="?", type=Path, metavar="RESULTS", help="results.json, or the folder of a run")
    add("--table", action="store_true", help="print the table in Markdown and write nothing")
    add("--columns", nargs="+", metavar="KEY", help="only these scores in the table")
    marks = "renew the tables of documents, between <!-- agentsd-eval FILE.json COLUMN … --> and <!-- /agentsd-eval -->"
    add("--into", nargs="+", type=Path, metavar="DOCUMENT", help=marks)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after one line about bad input, or 130 after an interrupt."""
    words = list(sys.argv[1:] if argv is None else argv)

    def work() -> None:
        args = build_parser().parse_args(words)
        args.words = [PROGRAM, *words]
        args.work(args)

    return command.run(
        PROGRAM,
        work,
        interrupted=lambda: "interrupted; the same command resumes",
        out_of_memory="out of memory with one image at a time; what is finished is kept; --dtype float16 needs less",
    )


def _state(device: str | None) -> Any:
    """This process among all that accelerate has launched."""
    from accelerate import PartialState

    cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    # One process may have hours to do when another has finished.
    return PartialState(cpu=cpu, **({"timeout": timedelta(weeks=4)} if "LOCAL_RANK" in os.environ else {}))


def _run(args: argparse.Namespace) -> None:
    from agentsd.evaluation.run import score_run

    state = _state(args.device)
    protocol = _protocol(args)
    protocol = protocol.replace(scores=_scores(args, protocol.scores))
    scorer = None
    if state.is_main_process:  # before hours of work, not after them
        scorer = _scorer(args, protocol.scores, str(state.device))
        scorer.check_number(min(args.limit or protocol.prompts.number, protocol.prompts.number))
        if protocol.scores.features and protocol.reference.source == "images" and args.reference is None:
            raise ValueError(f"protocol {protocol.name} compares with real images: --reference names them")
    run, notes = _make(args, protocol, state)
    if scorer is not None:
        methods = [method.text for method in run.methods]
        options = {"reference": args.reference, "notes": notes, "command": args.words}
        _show(score_run(run.output, scorer, methods=methods, limit=run.limit, **options), run.output)


def _generate(args: argparse.Namespace) -> None:
    state = _state(args.device)
    run, _ = _make(args, _protocol(args), state)
    if state.is_main_process:
        print(f"{run.output}: {run.limit} images of each of {len(run.methods)} methods")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _protocol(args: argparse.Namespace) -> "Protocol":
    from agentsd.evaluation import protocols

    methods = args.method and ["stock", *(text for text in args.method if text != "stock")]
    changes = _given(methods=methods, steps=args.steps, batch=args.batch_size, dtype=args.dtype, model=args.model)
    return protocols.load(args.protocol).replace(**changes)


def _scores(args: argparse.Namespace, scores: "Scores") -> "Scores":
    changes = _given(features=args.features, pairs=args.pairs, bootstrap=args.bootstrap)
    return dataclasses.replace(scores, **changes, allow_singular=args.allow_singular or scores.allow_singular)


def _make(args: argparse.Namespace, protocol: "Protocol", state: Any) -> "tuple[Run, list[str]]":
    command.quieten()
    from agentsd.evaluation.run import available, make
    from agentsd.methods import method

    if protocol.model is None:
        raise ValueError(f"protocol {protocol.name} is for any Stable Diffusion: --model names it")
    methods, notes = available([method(text) for text in protocol.methods], required=bool(args.method))
    for note in notes if state.is_main_process else []:
        command.say(PROGRAM, f"warning: {note}")
    run = make(
        protocol,
        methods,
        args.output or Path("runs") / protocol.name,
        state,
        command=args.words,
        **{name: getattr(args, name) for name in MAKE},
    )
    return run, notes


def _scorer(args: argparse.Namespace, scores: "Scores", device: str | None = None) -> "Scorer":
    command.quieten()
    from agentsd import pipelines
    from agentsd.evaluation.networks import Weights, require
    from agentsd.evaluation.scorer import Scorer

    require("jinja2", "matplotlib")
    weights = Weights(args.inception_weights, args.lpips_weights, args.clip, args.dinov2)
    cache = args.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentsd"
    return Scorer(scores, weights, pipelines.find_device(args.device or device), cache, quiet=args.quiet)


def _score(args: argparse.Namespace) -> None:
    from agentsd.evaluation import protocols
    from agentsd.evaluation.run import read_run, score_folders, score_run

    options = {"limit": args.limit, "reference": args.reference, "command": args.words}
    if args.images:
        if args.run:
            raise ValueError("--images are folders instead of a run: leave one of both out")
        folders: dict[str, Path] = {}
        for text in args.images:
            name, equals, folder = text.partition("=")
            if not equals or not name or name in folders:
                raise ValueError(f"--images is {text!r}; it must be NAME=FOLDER, each name once")
            folders[name] = Path(folder)
        features = ("inception",) if args.reference else ()
        scores = _scores(args, protocols.Scores(features=features, pairs=("psnr", "ssim", "ms-ssim")))
        output = args.output or Path("runs") / "score"
        _show(score_folders(folders, _scorer(args, scores), output, **options), output)
        return
    folder = args.run or args.output
    if folder is None:
        raise ValueError("score needs the folder of a run, or --images")
    _, protocol = read_run(folder)
    scorer = _scorer(args, _scores(args, protocol.scores))
    _show(score_run(folder, scorer, **options), folder)


def _show(result: dict[str, Any], folder: Path) -> None:
    from agentsd.evaluation import report

    paths = report.write(result, folder)
    print(report.table(result))
    _name(paths)


def _name(paths: Sequence[Path]) -> None:
    print(*(f"wrote {path}" for path in paths), sep="\n")


def _report(args: argparse.Namespace) -> None:
    from agentsd.evaluation import report

    if bool(args.into) == bool(args.results):
        raise ValueError("report needs RESULTS, or --into with documents")
    if args.into:
        report.fill(args.into)
        _name(args.into)
    elif args.table or args.columns:
        print(report.summary(args.results, args.columns))
    else:
        folder = args.results if args.results.is_dir() else args.results.parent
        _name(report.write(report.read(args.results), folder))


if __name__ == "__main__":
    raise SystemExit(main())
