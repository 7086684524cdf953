"""An evaluation from its protocol to its result: images, scores, and where the numbers come from."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentsd import pipelines
from agentsd.evaluation import protocols
from agentsd.evaluation.generation import Run, generate
from agentsd.evaluation.pictures import list_pictures
from agentsd.evaluation.protocols import Protocol, Reference
from agentsd.evaluation.scorer import Scorer
from agentsd.evaluation.scoring import score
from agentsd.evaluation.timing import speeds, timings
from agentsd.methods import Method, missing
from agentsd.results import read_json, version

FEW = 50  # images


def available(methods: Sequence[Method], *, required: bool) -> tuple[tuple[Method, ...], list[str]]:
    """The methods that are installed, and a note for each that is not; ValueError if all are `required`."""
    absent = missing(methods)
    if absent and required:
        text, package = next(iter(absent.items()))
        raise ValueError(f"method {text!r} needs the package {package}: pip install 'agentsd[bench]'")
    notes = [f"{text} is left out: the package {package} is not installed" for text, package in absent.items()]
    return tuple(m for m in methods if m.text not in absent), notes


def make(
    protocol: Protocol,
    methods: Sequence[Method],
    output: Path,
    state: Any,
    *,
    limit: int | None = None,
    captions: Path | None = None,
    model_config: str | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    threads: int = 1,
    command: Sequence[str] = (),
    quiet: bool = False,
) -> Run:
    """Make the images of a protocol that are not finished; every process of `state` calls this.

    Args:
        protocol, methods: what to make; the methods are those of the protocol that are installed.
        output, state: the folder of the run, and an `accelerate.PartialState`.
        limit, captions: only so many images of each method, and the file of a protocol that draws captions.
        model_config, allow_pickle, device: as `pipelines.load` takes them.
        threads: of each process on a CPU.
        command: what was typed, for the record.

    Raises:
        ValueError: an option is not one of this protocol or model, or the folder holds another run.
        OSError: a file cannot be read or written; what is finished stays.
    """
    assert protocol.model is not None
    prompts = tuple(protocols.prompts(protocol, captions))
    where = pipelines.find_device(device) if state.num_processes == 1 else state.device
    dtype = pipelines.find_dtype(protocol.dtype, where)
    if protocol.sampler:
        pipelines.check_scheduler(protocol.sampler)
    pickled: dict[str, Any] = {"allow_pickle": allow_pickle}
    with state.main_process_first():
        path = pipelines.find(protocol.model, **pickled) or pipelines.download(protocol.model, **pickled)
        output.mkdir(parents=True, exist_ok=True)

    def load() -> Any:
        pipe = pipelines.load(path, dtype=dtype, device=where, config=model_config, **pickled)
        multiple = pipelines.size_multiple(pipe)
        for name, side in (("width", protocol.width), ("height", protocol.height)):
            if side and side % multiple:
                raise ValueError(f"{name} is {side}; it must be a multiple of {multiple} for this model")
        if protocol.sampler:
            pipelines.set_scheduler(pipe, protocol.sampler)
        return pipe

    number, model = min(limit or len(prompts), len(prompts)), (protocol.model, pipelines.fingerprint(path))
    run = Run(protocol, tuple(methods), prompts, number, model, output, where, dtype, threads)
    generate(run, load, state, command, quiet)
    return run


def read_run(folder: Path) -> tuple[dict[str, Any], Protocol]:
    """run.json and the protocol in it; ValueError if there is none."""
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} holds no run: there is no run.json in it")
    run = read_json(folder / "run.json")
    return run, protocols.from_dict(run["protocol"])


def score_run(
    folder: Path,
    scorer: Scorer,
    *,
    methods: Sequence[str] | None = None,
    limit: int | None = None,
    reference: Path | None = None,
    notes: Sequence[str] = (),
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """The result for `report.write` of the images of a run.

    `methods` and `limit` choose images; `reference` is a folder or statistics of real ones; `notes` are sentences for
    the report, `command` is what was typed, for the record.
    """
    run, protocol = read_run(folder)
    protocol = protocol.replace(scores=scorer.scores)
    limit = limit or int(run["limit"])
    sets = {}
    for text in methods or run["methods"]:
        images = folder / "images" / Method(text, {}).folder
        sets[text] = [images / f"{index:05d}.png" for index in range(limit)]
        if absent := [path for path in sets[text] if not path.is_file()]:
            raise ValueError(f"{absent[0]} is not there yet; generate makes it, --limit takes fewer images")
    stock = next(iter(sets))
    prompts = run["prompts"][:limit]
    result = score(sets, scorer, prompts=prompts, reference=protocol.reference, where=reference)
    times = speeds(timings(folder), list(sets), stock)
    for row in result["methods"]:
        name, settings = row["method"], run["methods"][row["method"]]
        row |= {"settings": settings, "settings_sha256": Method(name, settings).sha256}
        row |= {"time": times[name]} if name in times else {}
        for shown in row["pictures"]:
            shown["prompt"] = prompts[shown["index"]]
    _name_pictures(result, sets, folder)
    return result | {
        "title": f"Evaluation: {protocol.name}, {limit} images for each method",
        "description": protocol.description,
        "protocol": protocol.to_dict(),
        "notes": [*notes, *_notes(run["sessions"], limit, scorer)],
        "provenance": {
            "protocol": f"{protocol.name}, SHA-256 {protocol.sha256}",
            "model": run["model"],
            "images": run["identity"],
            "reference": str(reference) if reference else protocol.reference.source,
            "scored with": _scored_with(scorer, command),
            "sessions": run["sessions"],
        },
    }


def score_folders(
    folders: dict[str, Path],
    scorer: Scorer,
    output: Path,
    *,
    limit: int | None = None,
    reference: Path | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """The result for `report.write` in `output` of the pictures of folders, compared in their order with the first."""
    sets = {name: list_pictures(folder) for name, folder in folders.items()}
    for name, found in sets.items():
        if limit and len(found) < limit:
            raise ValueError(f"{folders[name]} holds {len(found)} pictures, fewer than --limit {limit}")
        sets[name] = found[:limit]
    output.mkdir(parents=True, exist_ok=True)
    result = score(sets, scorer, reference=Reference("images"), where=reference)
    _name_pictures(result, sets, output)
    stock, number = next(iter(sets)), result["methods"][0]["images"]
    return result | {
        "title": f"Evaluation of {', '.join(sets)}, {number} images each",
        "description": f"Folders of images; {stock} is what the others are compared with.",
        "protocol": None,
        "notes": _notes([], number, scorer),
        "provenance": {
            "folders": {name: str(folder) for name, folder in folders.items()},
            "reference": str(reference) if reference else None,
            "scored with": _scored_with(scorer, command),
        },
    }


def _name_pictures(result: dict[str, Any], sets: dict[str, list[Path]], folder: Path) -> None:
    """Write down the paths of the pictures that are shown, from `folder`."""
    stock = next(iter(sets))
    for row in result["methods"]:
        for shown in row["pictures"]:
            for key, name in (("file", row["method"]), ("stock_file", stock)):
                shown[key] = os.path.relpath(sets[name][shown["index"]], folder)


def _notes(sessions: list[dict[str, Any]], images: int, scorer: Scorer) -> list[str]:
    notes = [
        f"{images} images are fewer than the {network.size} features of {network.name}: the covariance is singular, "
        "and the distance compares only with others of as many images"
        for network in scorer.networks
        if images <= network.size
    ]
    if images < FEW:
        notes.append(f"{images} images are too few to trust the intervals")
    for key in ("commit", "device", "processes"):
        found = sorted({str(session[key]) for session in sessions})
        if len(found) > 1:
            notes.append(f"the images and times are of sessions with different {key}: {', '.join(found)}")
    return notes


def _scored_with(scorer: Scorer, command: Sequence[str]) -> dict[str, Any]:
    packages = ("torch", "torch-fidelity", "torchmetrics", "transformers")
    return {
        **{package: version(package) for package in packages},
        **{f"{network.name} weights SHA-256": network.sha256 for network in scorer.networks},
        "device": str(scorer.device),
        "command": shlex.join(command),
    }
