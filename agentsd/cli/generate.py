"""agentsd-generate: a prompt becomes a picture, stock or accelerated."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentsd.cli import command
from agentsd.cli.arguments import ANY_MODEL, PROGRAM, Settings, build_parser
from agentsd.cli.comparison import comparison, difference, psnr
from agentsd.cli.images import Output, read_picture
from agentsd.cli.parameters import format_parameters, read_parameters

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from agentsd import AgentSDConfig


@dataclass(frozen=True)
class Recorded:
    """What a PNG file says about how its image was made."""

    settings: dict[str, Any] = field(default_factory=dict)
    config: "AgentSDConfig | None" = None
    batch: tuple[int, int] = (1, 0)  # its size, and the image's position in it
    model_hash: str | None = None
    files: dict[str, list[str]] = field(default_factory=dict)  # SHA-256 of the files that an option names
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Images made in one call: a prompt and a seed for each, and which of them are wanted."""

    prompts: list[str]
    seeds: list[int]
    wanted: list[int]


@dataclass(frozen=True)
class Plan:
    """Everything that is decided, and checked, before the model is loaded."""

    path: Path | None  # of the model; None before a download
    config: "AgentSDConfig | None"
    batches: list[Batch]
    output: Output
    device: "torch.device"
    dtype: "torch.dtype"
    loras: list[tuple[Path, float]]
    image: "Image | None"
    mask: "Image | None"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after one line about bad input, or 130 after an interrupt."""
    finished: list[Path] = []
    return command.run(
        PROGRAM,
        lambda: _run(vars(build_parser().parse_args(argv)), finished),
        interrupted=lambda: f"interrupted; images finished: {len(finished)}",
        out_of_memory="out of memory; a smaller --width and --height, --batch-size 1 or --dtype float16 need less",
    )


def _say(line: str) -> None:
    command.say(PROGRAM, line)


def _run(given: dict[str, Any], finished: list[Path]) -> None:
    recorded = _read(given["from_png"]) if "from_png" in given else Recorded()
    settings = Settings(**recorded.settings | given)
    settings.resolve()
    command.quieten()
    from agentsd import describe, pipelines

    plan = _plan(settings, given, recorded)
    started = time.perf_counter()
    path = plan.path or pipelines.download(settings.model, allow_pickle=settings.allow_pickle)
    pipe = _load(path, settings, plan)
    call = _call(pipe, settings, plan)
    fields = _fields(pipe, path, call, settings, plan)
    if recorded.model_hash not in (None, fields["Model hash"]) and "model" not in given:
        _say(f"warning: the model has changed since {settings.from_png} was made: the image will differ")
    for name, version in recorded.versions.items():
        if version != _versions()[name]:
            _say(f"warning: {settings.from_png} was made with {name} {version}: the image may differ a little")
    if not settings.quiet:
        print(f"{_summary(fields, plan)}; loaded in {time.perf_counter() - started:.1f} s", flush=True)
    with _threads(settings.threads):
        (_compare if settings.compare else _generate)(pipe, call, fields, settings, plan, finished)
    if not settings.quiet:
        print("nothing is accelerated" if plan.config is None else describe(pipe))
        if settings.model == "demo":
            print(ANY_MODEL)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Before the model is loaded


def _plan(settings: Settings, given: dict[str, Any], recorded: Recorded) -> Plan:
    from agentsd import pipelines
    from agentsd.refine import load_refinements

    config = _config(settings, given, recorded)
    if config and config.refine:
        load_refinements(config.refine)
    if settings.compare and config is None:
        raise ValueError("--compare shows stock and accelerated: leave out --stock, or name a --preset")
    batches = _batches(settings, given, recorded)
    count = sum(len(batch.wanted) for batch in batches)
    output = Output(settings.output, count, ("", "-stock", "-accelerated") if settings.compare else ("",))
    device = pipelines.find_device(settings.device)
    dtype = pipelines.find_dtype(settings.dtype, device)
    if settings.scheduler:
        pipelines.check_scheduler(settings.scheduler)
    if settings.attention_backend:
        pipelines.check_attention_backend(settings.attention_backend)
    image, mask = _pictures(settings)
    loras = [_lora(text) for text in settings.lora]
    for lora, _ in loras:
        pipelines.check_lora(lora)
    for option, hashes in recorded.files.items():
        files = _files(settings, config)[option]
        if option not in given and files and hashes != [pipelines.sha256(file) for file in files]:
            raise ValueError(f"the {option.replace('_', ' ')} has changed since {settings.from_png} was made")
    path = pipelines.find(settings.model, allow_pickle=settings.allow_pickle)
    _check_size(settings, pipelines.size_multiple(path))
    output.check()
    if settings.model == "demo":
        from agentsd.demo import unknown_words

        prompts = [prompt for batch in batches for prompt in batch.prompts]
        unknown = dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt))
        if unknown:
            _say(f"warning: the demo model does not know: {', '.join(unknown)}")
    return Plan(path, config, batches, output, device, dtype, loras, image, mask)


def _config(settings: Settings, given: dict[str, Any], recorded: Recorded) -> "AgentSDConfig | None":
    from agentsd import AgentSDConfig

    changes = [f"--{name}" for name in ("preset", "config", "ratio", "set", "refine") if name in given]
    if settings.stock:
        if changes:
            raise ValueError(f"--stock excludes {' and '.join(changes)}")
        return None
    if settings.config:
        return _changed(AgentSDConfig.from_file(settings.config), settings)
    if settings.preset:
        return _changed(AgentSDConfig.from_preset(settings.preset), settings)
    if settings.from_png and recorded.config is None and not changes:
        return None
    return _changed(recorded.config or AgentSDConfig.from_preset("paper"), settings)


def _changed(config: "AgentSDConfig", settings: Settings) -> "AgentSDConfig":
    import yaml

    values = json.loads(json.dumps(config.to_dict()))
    if settings.ratio is not None:
        values["ratio"] = settings.ratio
    for assignment in settings.set:
        target, equals, text = assignment.partition("=")
        phase, slash, name = target.rpartition("/")
        if not equals or not name:
            raise ValueError(f"--set must be PHASE/FIELD=VALUE or FIELD=VALUE, not {assignment!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of --set {assignment!r} is not YAML") from error
        phases = [str(index) for index in range(len(values["phases"]))]
        if slash and phase not in ("*", *phases):
            raise ValueError(f"--set {assignment!r} must name one of the phases {', '.join(phases)}, or *")
        chosen = phases if phase == "*" else [phase]
        for scope in [values["phases"][int(index)] for index in chosen] if slash else [values]:
            scope[name] = value
    if refine := settings.refine or values["refine"]:
        values["refine"] = _absolute(refine)
    changed = type(config).from_dict(values)
    if settings.ratio is not None and not changed.uses_ratio:
        raise ValueError(f"--ratio {settings.ratio:g} plays no part: every phase has its own ratio or needs none")
    return changed


def _batches(settings: Settings, given: dict[str, Any], recorded: Recorded) -> list[Batch]:
    if settings.prompt_file:
        try:
            lines = settings.prompt_file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {settings.prompt_file} is not text in UTF-8") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompt-file {settings.prompt_file} holds no prompt")
    else:
        prompts = settings.prompt
    if not prompts:
        raise ValueError("--prompt, --prompt-file or --from-png is needed")
    try:
        "".join([*prompts, settings.negative_prompt]).encode()
    except UnicodeEncodeError as error:
        raise ValueError("the prompt is not text in UTF-8") from error
    prompts = [prompt for prompt in prompts for _ in range(settings.num_images)]
    if len(prompts) == 1 and "batch_size" not in given:
        # Kernels round by the shape they are given: for the same bits, a repeated image takes its place in a batch
        # of the same size, whose other images are made and dropped.
        size, position = recorded.batch
        seeds = [settings.seed + index - position for index in range(size)]
        return [Batch(prompts * size, seeds, [position])]
    starts = range(0, len(prompts), settings.batch_size)
    parts = [prompts[start : start + settings.batch_size] for start in starts]
    return [
        Batch(part, [settings.seed + start + index for index in range(len(part))], list(range(len(part))))
        for start, part in zip(starts, parts, strict=True)
    ]


def _pictures(settings: Settings) -> "tuple[Image | None, Image | None]":
    if settings.init_image is None:
        if settings.mask or settings.strength:
            raise ValueError(f"--{'mask' if settings.mask else 'strength'} needs --init-image")
        return None, None
    if settings.steps * settings.strength < 1:
        raise ValueError(f"--strength {settings.strength:g} of {settings.steps} steps leaves no step to make")
    image = read_picture(settings.init_image).convert("RGB")
    return image, read_picture(settings.mask).convert("L") if settings.mask else None


def _lora(text: str) -> tuple[Path, float]:
    path, colon, weight = text.rpartition(":")
    try:
        return Path(path if colon else text), float(weight if colon else 1)
    except ValueError:
        return Path(text), 1.0


def _files(settings: Settings, config: "AgentSDConfig | None") -> dict[str, list[Path]]:
    from agentsd.pipelines import check_lora

    return {
        "init_image": [settings.init_image] if settings.init_image else [],
        "mask": [settings.mask] if settings.mask else [],
        "lora": [check_lora(_lora(text)[0]) for text in settings.lora],
        "refine": [Path(config.refine)] if config and config.refine else [],
    }


def _check_size(settings: Settings, multiple: int) -> None:
    for name, value in (("width", settings.width), ("height", settings.height)):
        if value is not None and value % multiple:
            raise ValueError(f"--{name} must be a multiple of {multiple} for this model, not {value}")


# The model


def _load(path: Path, settings: Settings, plan: Plan) -> "DiffusionPipeline":
    from agentsd import apply, pipelines

    pipe = pipelines.load(
        path, dtype=plan.dtype, device=plan.device, allow_pickle=settings.allow_pickle, config=settings.model_config
    )
    pipe = pipelines.for_task(pipe, image=plan.image is not None, mask=plan.mask is not None)
    if settings.scheduler:
        pipelines.set_scheduler(pipe, settings.scheduler)
    pipelines.load_loras(pipe, plan.loras)
    if settings.attention_backend:
        pipelines.set_attention_backend(pipe, settings.attention_backend)
    if plan.config is not None:
        apply(pipe, plan.config)
    if settings.compile:
        pipe.unet.compile_repeated_blocks(fullgraph=True)
    return pipe


def _call(pipe: "DiffusionPipeline", settings: Settings, plan: Plan) -> dict[str, Any]:
    """Return the arguments that all calls of the pipeline have in common."""
    from agentsd import pipelines

    multiple = pipelines.size_multiple(pipe)
    _check_size(settings, multiple)
    width, height = pipelines.default_size(pipe)
    if plan.image is not None:
        width, height = (max(multiple, side // multiple * multiple) for side in plan.image.size)
    size = settings.width or width, settings.height or height
    call: dict[str, Any] = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance_scale}
    if plan.image is None:
        return call | {"width": size[0], "height": size[1]}
    call |= {"image": plan.image.resize(size), "strength": settings.strength}
    if plan.mask is None:  # takes its size from the image
        return call
    mask = plan.mask.resize(size).point(lambda value: 255 if value >= 128 else 0)
    return call | {"mask_image": mask, "width": size[0], "height": size[1]}


# Making images


def _make(
    pipe: "DiffusionPipeline", batch: Batch, call: dict[str, Any], settings: Settings, label: str
) -> "tuple[list[Image], float]":
    """Return the images of a batch and the seconds for each."""
    import torch
    from PIL import Image

    size = len(batch.prompts)
    pipe.set_progress_bar_config(desc=label, disable=True if settings.quiet else None, leave=False)
    started = time.perf_counter()
    output = pipe(
        prompt=batch.prompts,
        negative_prompt=[settings.negative_prompt] * size if settings.negative_prompt else None,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch.seeds],
        **{name: [value] * size if name in ("image", "mask_image") else value for name, value in call.items()},
    )
    seconds = (time.perf_counter() - started) / size
    if any(getattr(output, "nsfw_content_detected", None) or []):
        _say("warning: the model's safety checker has blackened an image")
    images = output.images
    if "mask_image" in call:
        images = [Image.composite(image, call["image"], call["mask_image"]) for image in images]
    return images, seconds


def _generate(
    pipe: "DiffusionPipeline",
    call: dict[str, Any],
    fields: dict[str, Any],
    settings: Settings,
    plan: Plan,
    finished: list[Path],
) -> None:
    for batch, label in zip(plan.batches, _labels(plan.batches), strict=True):
        images, seconds = _make(pipe, batch, call, settings, label)
        for index in batch.wanted:
            finished += plan.output.save([(images[index], _text(fields, settings, batch, index, plan.config))])
            _report(finished[-1:], f"seed {batch.seeds[index]}, {seconds:.2f} s", settings)


def _compare(
    pipe: "DiffusionPipeline",
    call: dict[str, Any],
    fields: dict[str, Any],
    settings: Settings,
    plan: Plan,
    finished: list[Path],
) -> None:
    from agentsd import disabled

    def run(kind: str, batch: Batch, call: dict[str, Any], label: str) -> "tuple[list[Image], float]":
        with disabled(pipe) if kind == "stock" else contextlib.nullcontext():
            return _make(pipe, batch, call, settings, f"{label}, {kind}")

    kinds = ["stock", "accelerated"]
    few = math.ceil(4 / call.get("strength", 1))  # enough to meet every phase; compiling may happen anywhere in a run
    warm_up = settings.steps if settings.compile else min(few, settings.steps)
    for kind in kinds:
        run(kind, plan.batches[0], call | {"num_inference_steps": warm_up}, "warm-up")
    how = f"each timed once, by turns, after a warm-up of {warm_up} steps each"
    for number, (batch, label) in enumerate(zip(plan.batches, _labels(plan.batches), strict=True)):
        runs = {kind: run(kind, batch, call, label) for kind in (kinds if number % 2 == 0 else kinds[::-1])}
        times = [runs[kind][1] for kind in kinds]
        speed = f"{times[0] / times[1]:.2f}x"
        for index in batch.wanted:
            stock, accelerated = (runs[kind][0][index] for kind in kinds)
            texts = [_text(fields, settings, batch, index, config) for config in (None, plan.config)]
            decibels = psnr(accelerated, stock)
            closeness = "identical" if decibels == math.inf else f"PSNR {decibels:.1f} dB"
            delta, factor = difference(accelerated, stock)
            panels = [
                (stock, "Stock", f"{times[0]:.2f} s"),
                (accelerated, "AgentSD", f"{times[1]:.2f} s, {speed} the speed"),
                (delta, f"Difference, amplified {factor}x" if factor > 1 else "Difference", closeness),
            ]
            details = f"{_summary(fields, plan)}, seed {batch.seeds[index]}; {_name(settings, plan)}; {how}"
            picture = comparison(panels, batch.prompts[index], details)
            paths = plan.output.save([(picture, texts[1]), (stock, texts[0]), (accelerated, texts[1])])
            finished.append(paths[0])
            line = f"stock {times[0]:.2f} s, accelerated {times[1]:.2f} s ({speed}), {closeness}, {how}"
            names = f"beside it {paths[1].name} and {paths[2].name}"
            _report(paths, f"seed {batch.seeds[index]}, {line}; {names}", settings)


def _report(paths: list[Path], line: str, settings: Settings) -> None:
    print(*paths, sep="\n", flush=True) if settings.quiet else print(f"{paths[0]}: {line}", flush=True)


def _labels(batches: list[Batch]) -> list[str]:
    total = sum(len(batch.wanted) for batch in batches)
    labels, first = [], 1
    for batch in batches:
        last = first + len(batch.wanted) - 1
        labels.append(f"image {first}/{total}" if first == last else f"images {first}-{last}/{total}")
        first = last + 1
    return labels


def _summary(fields: dict[str, Any], plan: Plan) -> str:
    return (
        f"{fields['Model']}: {fields['Size']}, {fields['Steps']} steps, {fields['Sampler']}, guidance "
        f"{fields['CFG scale']}, {_dtype(plan)} on {plan.device}"
    )


def _dtype(plan: Plan) -> str:
    return str(plan.dtype).removeprefix("torch.")


def _name(settings: Settings, plan: Plan) -> str:
    source = settings.config or settings.preset or settings.from_png or "paper"
    ratio = [f"ratio {plan.config.ratio:g}"] if plan.config and plan.config.uses_ratio else []
    return ", ".join([f"AgentSD {getattr(source, 'name', source)}", *ratio, *settings.set])


# What a file says about how its image was made


def _fields(
    pipe: "DiffusionPipeline", path: Path, call: dict[str, Any], settings: Settings, plan: Plan
) -> dict[str, Any]:
    """Return the fields that all images have in common, with the web UIs' names."""
    import torch

    from agentsd import __version__, pipelines

    model = "demo" if settings.model == "demo" else _absolute(settings.model)
    run = {
        "model": model,
        "model_config": settings.model_config and _absolute(settings.model_config),
        "lora": [f"{_absolute(lora)}:{_plain(weight)}" for lora, weight in plan.loras],
        "dtype": _dtype(plan),
        "device": str(plan.device),
        "scheduler": settings.scheduler,
        "attention_backend": settings.attention_backend,
        "compile": settings.compile,
        "threads": settings.threads or (torch.get_num_threads() if plan.device.type == "cpu" else 0),
        "init_image": settings.init_image and _absolute(settings.init_image),
        "mask": settings.mask and _absolute(settings.mask),
        "versions": _versions(),
        "sha256": {
            option: [pipelines.sha256(file) for file in files]
            for option, files in _files(settings, plan.config).items()
            if files
        },
    }
    width, height = call["image"].size if "image" in call else (call["width"], call["height"])
    return {
        "Steps": settings.steps,
        "Sampler": pipelines.sampler_name(pipe),
        "CFG scale": _plain(settings.guidance_scale),
        "Size": f"{width}x{height}",
        "Model hash": pipelines.fingerprint(path),
        "Model": Path(model).stem if path.is_file() else Path(model).name,
        "Denoising strength": _plain(settings.strength) if settings.init_image else None,
        "AgentSD run": json.dumps({key: value for key, value in run.items() if value}),
        "Version": f"AgentSD {__version__}",
    }


def _text(fields: dict[str, Any], settings: Settings, batch: Batch, index: int, config: "AgentSDConfig | None") -> str:
    size = len(batch.prompts)
    own = {
        "Seed": batch.seeds[index],
        "Batch size": size if size > 1 else None,
        "Batch pos": index if size > 1 else None,
        "AgentSD": "off" if config is None else json.dumps(config.to_dict()),
    }
    order = (
        "Steps, Sampler, CFG scale, Seed, Size, Model hash, Model, Denoising strength, Batch size, Batch pos, AgentSD, "
        "AgentSD run, Version"
    )
    pairs = {name: (fields | own)[name] for name in order.split(", ")}
    return format_parameters(batch.prompts[index], settings.negative_prompt, pairs)


def _read(path: Path) -> Recorded:
    from agentsd import AgentSDConfig
    from agentsd.pipelines import SCHEDULERS

    prompt, negative_prompt, fields = read_parameters(path)
    try:
        run = json.loads(fields.get("AgentSD run", "{}"))
        width, _, height = fields["Size"].partition("x")
        settings = {
            "prompt": [prompt],
            "negative_prompt": negative_prompt,
            "steps": int(fields["Steps"]),
            "guidance_scale": float(fields["CFG scale"]),
            "seed": int(fields["Seed"]),
            "width": int(width),
            "height": int(height),
        }
        names = [name for name, (*_, sampler) in SCHEDULERS.items() if sampler == fields["Sampler"]]
        if not run and names:
            settings["scheduler"] = names[0]
        files, versions = run.pop("sha256", {}), run.pop("versions", {})
        if "init_image" in run:
            settings["strength"] = float(fields["Denoising strength"])
        settings |= {key: Path(value) if key in ("init_image", "mask") else value for key, value in run.items()}
        agentsd = fields.get("AgentSD", "off")
        config = None if agentsd == "off" else AgentSDConfig.from_dict(json.loads(agentsd))
        batch = int(fields.get("Batch size", 1)), int(fields.get("Batch pos", 0))
        unknown = run.keys() - {"model", "model_config", "lora", "dtype", "device", "scheduler", "attention_backend"}
        if unknown - {"compile", "threads", "init_image", "mask"}:
            raise ValueError(f"unknown: {', '.join(unknown)}")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} carries generation parameters that cannot be read ({error})") from error
    return Recorded(settings, config, batch, fields.get("Model hash"), files, versions)


def _versions() -> dict[str, str]:
    import diffusers
    import torch

    return {"torch": torch.__version__, "diffusers": diffusers.__version__}


def _absolute(name: str | Path) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else str(name)


def _plain(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


if __name__ == "__main__":
    raise SystemExit(main())
