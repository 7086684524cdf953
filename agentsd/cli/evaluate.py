"""agentsd-eval: images of every method, their scores and one report."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentsd.cli import command
from agentsd.cli.command import Parser, formatter, number, whole

if TYPE_CHECKING:
    from agentsd.evaluation.generation import Run
    from agentsd.evaluation.methods import Method
    from agentsd.evaluation.protocols import Protocol
    from agentsd.evaluation.scoring import Scorer

PROGRAM = "agentsd-eval"
FEW = 50
EXAMPLES = """examples:
  agentsd-eval run --protocol demo --limit 64
  agentsd-eval run --protocol paper --model stable-diffusion-v1-5/stable-diffusion-v1-5 --reference ILSVRC2012/val
  accelerate launch --num_processes 8 -m agentsd.cli.evaluate generate --protocol tomesd --model FOLDER
  agentsd-eval score --images stock=FOLDER --images mine=FOLDER --reference FOLDER
  agentsd-eval report runs/demo

A run that was interrupted goes on where it was when the same command is given again.
"""


def build_parser() -> argparse.ArgumentParser:
    """The options of every subcommand."""
    from agentsd.evaluation.protocols import NETWORKS, PAIRS, names

    parser = Parser(
        prog=PROGRAM,
        description="Measure what an acceleration does to the images.",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    what = Parser(add_help=False)
    group = what.add_argument_group("what to make")
    group.add_argument(
        "--protocol", default="demo", metavar="NAME|FILE", help=f"{', '.join(names())}, or a .yaml file (default: demo)"
    )
    group.add_argument(
        "--method",
        action="append",
        metavar="NAME[:KEY=VALUE,…]",
        help="these methods instead of the protocol's: stock, a preset or a peer; a key 0/key is of the first phase "
        "alone; repeatable",
    )
    group.add_argument("--limit", type=whole(1), metavar="N", help="only the first N images of each method")
    group.add_argument("--steps", type=whole(1), metavar="N", help="denoising steps (default: the protocol's)")
    group.add_argument(
        "--captions", type=Path, metavar="FILE", help="for protocols that draw captions: .json of COCO, .tsv or .txt"
    )
    group = what.add_argument_group("model")
    group.add_argument("--model", metavar="MODEL", help="what agentsd-generate --model takes (default: the protocol's)")
    group.add_argument("--model-config", metavar="FOLDER", help="for a single file: where its configuration is")
    group.add_argument("--allow-pickle", action="store_true", help="load pickled weights too")
    group.add_argument("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16 (default: the protocol's)")
    group.add_argument("--batch-size", type=whole(1), metavar="N", help="images made at once (default: the protocol's)")
    group.add_argument(
        "--threads",
        type=whole(1),
        default=1,
        metavar="N",
        help="on a CPU, of each process; they are part of what the images depend on (default: 1)",
    )

    where = Parser(add_help=False)
    group = where.add_argument_group("where")
    group.add_argument("--output", type=Path, metavar="FOLDER", help="of the run (default: runs/PROTOCOL)")
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, … (default: the best there is)")
    group.add_argument("--quiet", action="store_true", help="no progress bars")

    how = Parser(add_help=False)
    group = how.add_argument_group("scores")
    group.add_argument(
        "--reference",
        type=Path,
        metavar="FOLDER|FILE.npz",
        help="real images, or their mean and covariance as pytorch-fid saves them",
    )
    group.add_argument(
        "--inception-weights", type=Path, metavar="FILE", help="FID's Inception (default: torch-fidelity's download)"
    )
    group.add_argument(
        "--lpips-weights",
        type=Path,
        metavar="FILE",
        help="torchvision's weights of LPIPS's network (default: its download)",
    )
    group.add_argument("--clip", metavar="FOLDER|ID", help="CLIP for transformers (default: the protocol's)")
    group.add_argument("--dinov2", metavar="FOLDER|ID", help="DINOv2 for transformers (default: the protocol's)")
    group.add_argument("--checker", type=Path, metavar="FILE", help="another attribute checker for the embedded model")
    group.add_argument("--features", nargs="*", metavar="NAME", help=f"{', '.join(NETWORKS)} instead of the protocol's")
    group.add_argument("--pairs", nargs="*", metavar="NAME", help=f"{', '.join(PAIRS)} instead of the protocol's")
    group.add_argument(
        "--allow-singular", action="store_true", help="Fréchet distances of fewer images than features too"
    )
    group.add_argument(
        "--bootstrap", type=whole(1), metavar="N", help="resamples behind the intervals (default: the protocol's)"
    )
    group.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="features, by the hash of what they are of (default: ~/.cache/agentsd)",
    )

    def add(name: str, help: str, *parents: Parser) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", parents=parents, formatter_class=formatter
        )

    add("run", "generate, score and report", what, where, how)
    add("generate", "make the images; what is finished is kept", what, where)
    score = add("score", "score the images of a run, or folders of images", where, how)
    score.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder of a run (default: --output)")
    score.add_argument(
        "--images",
        action="append",
        metavar="NAME=FOLDER",
        help="folders instead of a run; the first is stock, whose images the others' are compared with in the order of "
        "their names; repeatable",
    )
    score.add_argument("--limit", type=whole(1), metavar="N", help="only the first N images of each method")
    error = add("error", "how far each method's attention is from the stock attention, by level and noise level", where)
    error.add_argument("--model", default="demo", metavar="MODEL", help="what agentsd-generate takes (default: demo)")
    error.add_argument(
        "--method",
        action="append",
        metavar="NAME[:KEY=VALUE,…]",
        help="a preset or tomesd; kv and merge for short; pooled, nystrom and skipped for comparison; repeatable "
        "(default: all of the table)",
    )
    error.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable (default: scenes)")
    error.add_argument("--prompts", type=whole(1), default=6, metavar="N", help="scenes to draw (default: 6)")
    error.add_argument("--steps", type=whole(1), default=20, metavar="N", help="(default: 20)")
    error.add_argument("--guidance-scale", type=number, default=4.0, metavar="G", help="(default: 4)")
    error.add_argument("--dtype", metavar="DTYPE", help="(default: float16 on cuda, else float32)")
    error.add_argument("--threads", type=whole(1), metavar="N", help="on a CPU (default: torch's)")
    report = add("report", "write the report of a results.json again, or print its table")
    report.add_argument(
        "results", nargs="?", type=Path, metavar="RESULTS", help="results.json, the folder of a run, or errors.json"
    )
    report.add_argument("--table", action="store_true", help="print the table in Markdown and write nothing")
    report.add_argument("--columns", nargs="+", metavar="KEY", help="only these scores in the table")
    report.add_argument(
        "--into",
        nargs="+",
        type=Path,
        metavar="TEXT",
        help="make the tables of texts again, between <!-- agentsd-eval FILE.json COLUMN … --> and "
        "<!-- /agentsd-eval -->",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after one line about bad input, or 130 after an interrupt."""
    words = list(sys.argv[1:] if argv is None else argv)

    def work() -> None:
        args = build_parser().parse_args(words)
        args.words = words
        commands = {"run": _run, "generate": _generate, "score": _score, "report": _report, "error": _error}
        commands[args.command](args)

    return command.run(
        PROGRAM,
        work,
        interrupted=lambda: "interrupted; the same command goes on where it was",
        out_of_memory="out of memory with one image at a time; what is finished is kept; --dtype float16 needs less",
    )


def _state(device: str | None) -> Any:
    """This process's place among all that accelerate has launched."""
    from accelerate import PartialState

    cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    # One process may have hours to do when another has finished.
    return PartialState(cpu=cpu, **({"timeout": timedelta(weeks=4)} if "LOCAL_RANK" in os.environ else {}))


def _run(args: argparse.Namespace) -> None:
    state = _state(args.device)
    protocol = _protocol(args)
    scorer = None
    if state.is_main_process:  # before hours of work, not after them
        scorer = _scorer(args, protocol.scores, str(state.device))
        scorer.check_number(min(args.limit or protocol.prompts.number, protocol.prompts.number))
        if protocol.scores.features and protocol.reference.source == "images" and args.reference is None:
            raise ValueError(f"protocol {protocol.name} compares with real images: --reference names them")
    run, left_out = _make(args, protocol, state)
    if scorer is not None:
        _score_run(args, run.output, scorer, run.limit, [method.text for method in run.methods], left_out)


def _generate(args: argparse.Namespace) -> None:
    state = _state(args.device)
    run, _ = _make(args, _protocol(args), state)
    if state.is_main_process:
        print(f"{run.output}: {run.limit} images of each of {len(run.methods)} methods")


def _protocol(args: argparse.Namespace) -> "Protocol":
    from agentsd.evaluation import protocols

    protocol = protocols.load(args.protocol)
    changes = {
        "methods": args.method,
        "steps": args.steps,
        "batch": args.batch_size,
        "dtype": args.dtype,
        "model": args.model,
    }
    if args.method and args.method[0] != "stock":
        changes["methods"] = ["stock", *(text for text in args.method if text != "stock")]
    protocol = protocol.replace(**{key: value for key, value in changes.items() if value is not None})
    return protocol.replace(scores=_scores(args, protocol.scores)) if hasattr(args, "features") else protocol


def _scores(args: argparse.Namespace, scores: Any) -> Any:
    import dataclasses

    changes = {"features": args.features, "pairs": args.pairs, "bootstrap": args.bootstrap}
    if args.allow_singular:
        changes["allow_singular"] = True
    return dataclasses.replace(scores, **{key: value for key, value in changes.items() if value is not None})


def _methods(args: argparse.Namespace, protocol: "Protocol") -> tuple[tuple["Method", ...], list[str]]:
    """The protocol's methods, without the peers that are not installed; those that were asked for by name must be."""
    from agentsd.evaluation.methods import method, missing

    wanted = [method(text) for text in protocol.methods]
    absent = missing(wanted)
    if absent and args.method:
        text, package = next(iter(absent.items()))
        raise ValueError(f"method {text!r} needs the package {package}: pip install 'agentsd[bench]'")
    left_out = [f"{text} is left out: the package {package} is not installed" for text, package in absent.items()]
    return tuple(m for m in wanted if m.text not in absent), left_out


def _make(args: argparse.Namespace, protocol: "Protocol", state: Any) -> tuple["Run", list[str]]:
    command.quieten()
    from agentsd import pipelines
    from agentsd.evaluation import protocols
    from agentsd.evaluation.generation import Run, generate

    if protocol.model is None:
        raise ValueError(f"protocol {protocol.name} is for any Stable Diffusion: --model names it")
    methods, left_out = _methods(args, protocol)
    for line in left_out if state.is_main_process else []:
        command.say(PROGRAM, f"warning: {line}")
    prompts = tuple(protocols.prompts(protocol, args.captions))
    device = pipelines.find_device(args.device) if state.num_processes == 1 else state.device
    dtype = pipelines.find_dtype(protocol.dtype, device)
    if protocol.sampler:
        pipelines.check_scheduler(protocol.sampler)
    output = args.output or Path("runs") / protocol.name
    with state.main_process_first():
        path = pipelines.find(protocol.model, allow_pickle=args.allow_pickle) or pipelines.download(
            protocol.model, allow_pickle=args.allow_pickle
        )
        output.mkdir(parents=True, exist_ok=True)
    run = Run(
        protocol=protocol,
        methods=methods,
        prompts=prompts,
        limit=min(args.limit or len(prompts), len(prompts)),
        model=(protocol.model, pipelines.fingerprint(path)),
        output=output,
        device=device,
        dtype=dtype,
        threads=args.threads,
    )

    def load() -> Any:
        pipe = pipelines.load(
            path, dtype=dtype, device=device, allow_pickle=args.allow_pickle, config=args.model_config
        )
        multiple = pipelines.size_multiple(pipe)
        for name in ("width", "height"):
            value = getattr(protocol, name)
            if value is not None and value % multiple:
                raise ValueError(f"{name} is {value}; it must be a multiple of {multiple} for this model")
        if protocol.sampler:
            pipelines.set_scheduler(pipe, protocol.sampler)
        return pipe

    generate(run, load, state, [PROGRAM, *args.words], args.quiet)
    return run, left_out


def _cache(args: argparse.Namespace) -> Path:
    if args.cache:
        return Path(args.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentsd"


def _scorer(args: argparse.Namespace, scores: Any, device: str) -> "Scorer":
    command.quieten()
    from agentsd import pipelines
    from agentsd.evaluation.networks import Weights, needs
    from agentsd.evaluation.scoring import Scorer

    with needs("matplotlib", "eval"):
        import matplotlib  # noqa: F401
    weights = Weights(args.inception_weights, args.lpips_weights, args.clip, args.dinov2, args.checker)
    return Scorer(scores, weights, pipelines.find_device(args.device or device), _cache(args), quiet=args.quiet)


def _score(args: argparse.Namespace) -> None:
    from agentsd.evaluation import protocols
    from agentsd.evaluation.files import pictures, read_json

    if args.images:
        if args.run:
            raise ValueError("--images are folders instead of a run: leave one of both out")
        sets = {}
        for text in args.images:
            name, equals, folder = text.partition("=")
            if not equals or not name or name in sets:
                raise ValueError(f"--images is {text!r}; it must be NAME=FOLDER, each name once")
            found = pictures(Path(folder))
            if args.limit and len(found) < args.limit:
                raise ValueError(f"{folder} holds {len(found)} pictures, fewer than --limit {args.limit}")
            sets[name] = found[: args.limit]
        features = ("inception",) if args.reference else ()
        scores = _scores(args, protocols.Scores(features=features, pairs=("psnr", "ssim", "ms-ssim")))
        _score_folders(args, sets, _scorer(args, scores, "cpu" if args.device == "cpu" else _best()))
        return
    folder = args.run or args.output
    if folder is None:
        raise ValueError("score needs the folder of a run, or --images")
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} holds no run: there is no run.json in it")
    run = read_json(folder / "run.json")
    protocol = protocols.from_dict(run["protocol"])
    scores = _scores(args, protocol.scores)
    _score_run(args, folder, _scorer(args, scores, _best()), args.limit or run["limit"], list(run["methods"]), [])


def _best() -> str:
    from agentsd.pipelines import find_device

    return str(find_device())


def _score_run(
    args: argparse.Namespace, folder: Path, scorer: "Scorer", limit: int, methods: list[str], left_out: list[str]
) -> None:
    import dataclasses

    from agentsd.evaluation import protocols
    from agentsd.evaluation.files import read_json
    from agentsd.evaluation.generation import timings
    from agentsd.evaluation.methods import Method
    from agentsd.evaluation.scoring import score, speeds

    run = read_json(folder / "run.json")
    protocol = protocols.from_dict(run["protocol"])
    protocol = dataclasses.replace(protocol, scores=scorer.scores)
    sets = {}
    for text in methods:
        paths = [folder / "images" / Method(text, {}).folder / f"{index:05d}.png" for index in range(limit)]
        if absent := [path for path in paths if not path.is_file()]:
            raise ValueError(f"{absent[0]} is not there yet; generate makes it, --limit takes fewer images")
        sets[text] = paths
    prompts = run["prompts"][:limit]
    result = score(sets, scorer, prompts=prompts, reference=protocol.reference, where=args.reference, protocol=protocol)
    times = speeds(timings(folder), methods, methods[0])
    for row in result["methods"]:
        row["settings"] = run["methods"][row["method"]]
        row["settings_sha256"] = Method(row["method"], row["settings"]).sha256
        if row["method"] in times:
            row["time"] = times[row["method"]]
        for shown in row["pictures"]:
            shown["prompt"] = prompts[shown["index"]]
            for key, name in (("file", row["method"]), ("stock_file", methods[0])):
                shown[key] = str(sets[name][shown["index"]].relative_to(folder))
    sessions = run["sessions"]
    notes = [*left_out, *_notes(sessions, limit, scorer)]
    about = {
        "protocol": f"{protocol.name}, SHA-256 {protocol.sha256}",
        "model": run["model"],
        "images": run["identity"],
        "reference": str(args.reference) if args.reference else protocol.reference.source,
        "scored with": _versions(scorer, args),
        "sessions": sessions,
    }
    result |= {
        "title": f"Evaluation: {protocol.name}, {limit} images for each method",
        "description": protocol.description,
        "protocol": protocol.to_dict(),
        "notes": notes,
        "provenance": about,
    }
    _finish(result, folder)


def _notes(sessions: list[dict[str, Any]], limit: int, scorer: "Scorer") -> list[str]:
    notes = [
        f"{limit} images are fewer than the {network.size} features of {network.name}: the covariance is singular, "
        "and the distance compares only with others of as many images"
        for network in scorer.networks
        if limit <= network.size
    ]
    if limit < FEW:
        notes.append(f"{limit} images are too few to trust the intervals")
    for key in ("commit", "device"):
        found = {str(session.get(key)) for session in sessions}
        if len(found) > 1:
            notes.append(f"the images were made in sessions with more than one {key}: {', '.join(sorted(found))}")
    if len({session["processes"] for session in sessions}) > 1:
        notes.append("the sessions had different numbers of processes: the times are a mixture")
    return notes


def _versions(scorer: "Scorer", args: argparse.Namespace) -> dict[str, Any]:
    from agentsd.evaluation.methods import version

    packages = ("torch", "torch-fidelity", "torchmetrics", "transformers")
    found: dict[str, Any] = {package: version(package) for package in packages}
    found |= {f"{network.name} weights SHA-256": network.sha256 for network in scorer.networks}
    return found | {"device": str(scorer.device), "command": shlex.join([PROGRAM, *args.words])}


def _score_folders(args: argparse.Namespace, sets: dict[str, list[Path]], scorer: "Scorer") -> None:
    from agentsd.evaluation.protocols import Reference
    from agentsd.evaluation.scoring import score

    output = args.output or Path("runs") / "score"
    output.mkdir(parents=True, exist_ok=True)
    result = score(sets, scorer, reference=Reference("images"), where=args.reference)
    number = len(next(iter(sets.values())))
    stock = next(iter(sets))
    for row in result["methods"]:
        for shown in row["pictures"]:
            for key, name in (("file", row["method"]), ("stock_file", stock)):
                shown[key] = os.path.relpath(sets[name][shown["index"]], output)
    result |= {
        "title": f"Evaluation of {', '.join(sets)}, {number} images each",
        "description": f"Folders of images; {stock} is what the others are compared with.",
        "protocol": None,
        "notes": _notes([], number, scorer),
        "provenance": {
            "folders": {name: str(paths[0].parent) for name, paths in sets.items()},
            "reference": str(args.reference) if args.reference else None,
            "scored with": _versions(scorer, args),
        },
    }
    _finish(result, output)


def _finish(result: dict[str, Any], folder: Path) -> None:
    from agentsd.evaluation import report

    paths = report.write(result, folder)
    print(report.table(result))
    for path in paths:
        print(f"wrote {path}")


def _report(args: argparse.Namespace) -> None:
    from agentsd.evaluation import report, texts
    from agentsd.evaluation.files import write_bytes

    if bool(args.into) == bool(args.results):
        raise ValueError("report needs RESULTS, or --into with texts")
    if args.into:
        for text, content in [(text, texts.filled(text)) for text in args.into]:
            write_bytes(text, content.encode())
            print(f"wrote {text}")
        return
    if args.table or args.columns:
        print(texts.summary(args.results, args.columns))
        return
    result = report.read(args.results)
    folder = args.results if args.results.is_dir() else args.results.parent
    for path in report.write(result, folder):
        print(f"wrote {path}")


def _error(args: argparse.Namespace) -> None:
    command.quieten()
    import torch

    from agentsd import pipelines
    from agentsd.benchmark import environment
    from agentsd.demo.accuracy import held_out_prompts
    from agentsd.evaluation import errors
    from agentsd.evaluation.files import write_bytes, write_json
    from agentsd.evaluation.networks import needs

    with needs("torchmetrics", "eval"):
        import torchmetrics  # noqa: F401
    variants = [errors.variant(text) for text in args.method or errors.VARIANTS]
    absent = errors.missing(variants)
    if absent and args.method:
        text, package = next(iter(absent.items()))
        raise ValueError(f"method {text!r} needs the package {package}: pip install 'agentsd[bench]'")
    variants = [wanted for wanted in variants if wanted.text not in absent]
    output = args.output or Path("runs") / "error"
    output.mkdir(parents=True, exist_ok=True)
    device = pipelines.find_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    pipe = pipelines.load(args.model, dtype=pipelines.find_dtype(args.dtype, device), device=device)
    prompts = args.prompt or held_out_prompts(args.prompts)
    result = errors.measure(pipe, variants, prompts, steps=args.steps, guidance=args.guidance_scale, quiet=args.quiet)
    result["provenance"] = {
        "command": shlex.join([PROGRAM, *args.words]),
        "prompts": prompts,
        "steps": args.steps,
        "guidance": args.guidance_scale,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        **environment(str(device)),
    }
    write_json(output / "errors.json", result)
    write_bytes(output / "errors.md", (errors.tables(result) + "\n").encode())
    print(errors.tables(result))
    print(f"wrote {output / 'errors.json'}\nwrote {output / 'errors.md'}")


if __name__ == "__main__":
    raise SystemExit(main())
