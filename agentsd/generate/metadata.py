"""What a PNG file says about how its image was made, and reading that back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from agentsd import __version__, pipelines
from agentsd.config import AgentSDConfig
from agentsd.images import format_parameters, read_parameters

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_ORDER = (
    *("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model hash", "Model", "Denoising strength"),
    *("Batch size", "Batch pos", "AgentSD", "AgentSD run", "Version"),
)
_SAMPLING = (("Steps", "steps", int), ("CFG scale", "guidance_scale", float), ("Seed", "seed", int))
# Of "AgentSD run", what is a setting of the same name.
_SETTINGS = {
    *("model", "model_config", "lora", "dtype", "device", "scheduler", "attention_backend", "compile", "threads"),
    *("init_image", "mask"),
}


@dataclass(frozen=True)
class Recorded:
    """What a PNG file says about how its image was made: options of the command, the configuration (None is stock), the
    size of its batch and the position in it, `pipelines.fingerprint`, and the SHA-256 of files that options name."""

    settings: dict[str, Any] = field(default_factory=dict)
    config: AgentSDConfig | None = None
    batch: tuple[int, int] = (1, 0)
    model_hash: str | None = None
    files: dict[str, list[str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> Recorded:
    """What a file of this package, or of a web UI, says.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no picture, or says nothing that can be read.
    """
    prompt, negative_prompt, fields = read_parameters(path)
    try:
        run = json.loads(fields.get("AgentSD run", "{}"))
        files, versions = run.pop("sha256", {}), run.pop("versions", {})
        settings: dict[str, Any] = {key: kind(fields[name]) for name, key, kind in _SAMPLING}
        width, height = map(int, fields["Size"].split("x"))
        settings |= {"prompt": [prompt], "negative_prompt": negative_prompt, "width": width, "height": height}
        names = [name for name, (*_, sampler) in pipelines.SCHEDULERS.items() if sampler == fields["Sampler"]]
        if "AgentSD run" not in fields and names:
            settings["scheduler"] = names[0]
        if "init_image" in run:
            settings["strength"] = float(fields["Denoising strength"])
        if unknown := run.keys() - _SETTINGS:
            raise ValueError(f"unknown: {', '.join(unknown)}")
        settings |= {key: Path(value) if key in ("init_image", "mask") else value for key, value in run.items()}
        plain = fields.get("AgentSD", "off")
        config = None if plain == "off" else AgentSDConfig.from_dict(json.loads(plain))
        batch = int(fields.get("Batch size", 1)), int(fields.get("Batch pos", 0))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} carries generation parameters that cannot be read ({error})") from error
    return Recorded(settings, config, batch, fields.get("Model hash"), files, versions)


def versions() -> dict[str, str]:
    """Of the libraries that round the numbers."""
    import diffusers

    return {"torch": torch.__version__, "diffusers": diffusers.__version__}


def describe_run(
    pipe: "DiffusionPipeline",
    run: Mapping[str, Any],
    *,
    steps: int,
    guidance_scale: float,
    size: tuple[int, int],
    model_hash: str | None = None,
    strength: float | None = None,
) -> dict[str, Any]:
    """The fields that all images of a run have in common, by the web UIs' names.

    Args:
        pipe: the pipeline that draws.
        run: settings that the web UIs have no names for; those that are empty are left out.
        steps, guidance_scale, strength: of the call; strength only where the image starts from another.
        size: width and height in pixels.
        model_hash: `pipelines.fingerprint`.
    """
    model = Path(run["model"])
    return {
        "Steps": steps,
        "Sampler": pipelines.sampler_name(pipe),
        "CFG scale": plain(guidance_scale),
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": model_hash,
        "Model": model.stem if model.suffix in (".safetensors", *pipelines.PICKLED) else model.name,
        "Denoising strength": None if strength is None else plain(strength),
        "AgentSD run": json.dumps({key: value for key, value in run.items() if value}),
        "Version": f"AgentSD {__version__}",
    }


def parameters(
    fields: Mapping[str, Any],
    prompt: str,
    negative_prompt: str,
    seed: int,
    config: AgentSDConfig | None,
    batch: tuple[int, int] = (1, 0),
) -> str:
    """The text of one image of a run; `batch` is its batch's size and its position in it."""
    image: dict[str, Any] = {"Seed": seed, "AgentSD": "off" if config is None else json.dumps(config.to_dict())}
    if batch[0] > 1:
        image |= {"Batch size": batch[0], "Batch pos": batch[1]}
    pairs = image | dict(fields)
    return format_parameters(prompt, negative_prompt, {name: pairs.get(name) for name in _ORDER})


def plain(value: float) -> str:
    """All digits of a number, without a point where it is whole."""
    return repr(float(value)).removesuffix(".0")
