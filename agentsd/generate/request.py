"""What is asked of agentsd-generate: settings, and all that is decided and checked before the model is loaded."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL.Image import Image

from agentsd import pipelines
from agentsd.config import AgentSDConfig, AgentSDWarning
from agentsd.demo import unknown_words
from agentsd.generate.metadata import Recorded, read
from agentsd.generate.output import Output
from agentsd.images import read_picture


@dataclass(kw_only=True)
class Settings:
    """What to do: the command line over what a PNG file recorded over these defaults; with None, steps 0, strength
    0 and guidance -1 the model or other options decide."""

    prompt: list[str] = field(default_factory=list)
    prompt_file: Path | None = None
    negative_prompt: str = ""
    from_png: Path | None = None
    model: str = "demo"
    model_config: str | None = None
    lora: list[str] = field(default_factory=list)
    dtype: str | None = None
    device: str | None = None
    allow_pickle: bool = False
    stock: bool = False
    preset: str | None = None
    config: Path | None = None
    set: list[str] = field(default_factory=list)
    attention_backend: str | None = None
    compile: bool = False
    steps: int = 0
    guidance_scale: float = -1
    scheduler: str | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_images: int = 1
    batch_size: int = 1
    init_image: Path | None = None
    strength: float = 0
    mask: Path | None = None
    output: Path = Path("outputs")
    compare: bool = False
    quiet: bool = False
    threads: int = 0  # recorded, not an option: sums are split, and so rounded, by the number of threads

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on other settings."""
        demo = self.model == "demo"
        self.steps = self.steps or (25 if demo else 50)
        if self.guidance_scale < 0:
            self.guidance_scale = 4.0 if demo else 7.5
        if self.init_image:
            self.strength = self.strength or (1.0 if self.mask else 0.8)

    def files(self) -> dict[str, list[Path]]:
        """The files that options name and that decide what is drawn."""
        return {
            "init_image": [self.init_image] if self.init_image else [],
            "mask": [self.mask] if self.mask else [],
            "lora": [pipelines.check_lora(_lora(text)[0]) for text in self.lora],
        }

    def check_size(self, multiple: int) -> None:
        """ValueError unless width and height are multiples of what the model needs."""
        for name, value in (("width", self.width), ("height", self.height)):
            if value is not None and value % multiple:
                raise ValueError(f"--{name} must be a multiple of {multiple} for this model, not {value}")


@dataclass(frozen=True)
class Batch:
    """Images made in one call: a prompt and a seed for each, and the positions of those that are wanted."""

    prompts: list[str]
    seeds: Sequence[int]
    wanted: Sequence[int]


@dataclass(frozen=True)
class Plan:
    """A request that was checked."""

    settings: Settings
    recorded: Recorded  # by --from-png
    path: Path | None  # of the model; None before a download
    config: AgentSDConfig | None  # None is stock
    batches: list[Batch]
    output: Output
    device: torch.device
    dtype: torch.dtype
    loras: list[tuple[Path, float]]  # with their weights
    image: Image | None  # to start from
    mask: Image | None


def check(given: dict[str, Any]) -> Plan:
    """Check a request without loading the model.

    Args:
        given: settings by name, only those that differ from the defaults or from what the file `from_png` says.

    Raises:
        ValueError, OSError: in one sentence, for the first thing that cannot be done.
    """
    recorded = read(given["from_png"]) if "from_png" in given else Recorded()
    if "model" in given:
        recorded = replace(recorded, model_hash=None)
    settings = Settings(**recorded.settings | given)
    config = _config(settings, given, recorded)
    if settings.compare and config is None:
        raise ValueError("--compare shows stock and accelerated: leave out --stock, or name a --preset")
    batches = _batches(settings, (1, 0) if "batch_size" in given else recorded.batch)
    count = sum(len(batch.wanted) for batch in batches)
    output = Output(settings.output, count, ("", "-stock", "-accelerated") if settings.compare else ("",))
    device = pipelines.find_device(settings.device)
    dtype = pipelines.find_dtype(settings.dtype, device)
    if settings.scheduler:
        pipelines.check_scheduler(settings.scheduler)
    if settings.attention_backend:
        pipelines.check_attention_backend(settings.attention_backend)
    image, mask = _pictures(settings)
    for option, files in settings.files().items():
        hashes = None if option in given else recorded.files.get(option)
        if hashes and files and hashes != [pipelines.sha256(file) for file in files]:
            raise ValueError(f"the {option.replace('_', ' ')} has changed since {settings.from_png} was made")
    path = pipelines.find(settings.model, allow_pickle=settings.allow_pickle)
    settings.check_size(pipelines.size_multiple(path))
    output.check()
    if settings.model == "demo":
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        if unknown := dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt)):
            warnings.warn(f"the demo model does not know: {', '.join(unknown)}", AgentSDWarning, stacklevel=2)
    loras = [_lora(text) for text in settings.lora]
    return Plan(settings, recorded, path, config, batches, output, device, dtype, loras, image, mask)


def _config(settings: Settings, given: dict[str, Any], recorded: Recorded) -> AgentSDConfig | None:
    changed = not given.keys().isdisjoint(("preset", "config", "set"))
    if settings.stock:
        if changed:
            raise ValueError("--stock excludes --preset, --config, --ratio and --set")
        return None
    if settings.config:
        config = AgentSDConfig.from_file(settings.config)
    elif settings.preset:
        config = AgentSDConfig.from_preset(settings.preset)
    elif settings.from_png and recorded.config is None and not changed:
        return None
    else:
        config = recorded.config or AgentSDConfig.from_preset("paper")
    return config.assign(_assignments(settings.set))


def _assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Each `KEY=VALUE` of `--set`, the last of a key in its place, as `AgentSDConfig.assign` takes them."""
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--set must be KEY=VALUE, not {text!r}")
        values.pop(key, None)
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of --set {text!r} is not YAML") from error
    return values


def _batches(settings: Settings, place: tuple[int, int]) -> list[Batch]:
    prompts = read_prompts("--prompt-file", settings.prompt_file) if settings.prompt_file else settings.prompt
    if not prompts:
        raise ValueError("--prompt, --prompt-file or --from-png is needed")
    try:
        "".join([*prompts, settings.negative_prompt]).encode()
    except UnicodeEncodeError as error:
        raise ValueError("the prompt is not text in UTF-8") from error
    prompts = [prompt for prompt in prompts for _ in range(settings.num_images)]
    if len(prompts) == 1:
        # Kernels round by the shape they are given: for the same bits, a repeated image takes its place in a batch
        # of the same size, whose other images are made and dropped.
        size, position = place
        seeds = range(settings.seed - position, settings.seed - position + size)
        return [Batch(prompts * size, seeds, [position])]
    seeds = range(settings.seed, settings.seed + len(prompts))
    parts = [slice(start, start + settings.batch_size) for start in range(0, len(prompts), settings.batch_size)]
    return [Batch(prompts[part], seeds[part], range(len(prompts[part]))) for part in parts]


def read_prompts(option: str, file: Path) -> list[str]:
    """The prompts in a text file, one on each line; a ValueError names the option."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {file} is not text in UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{option} {file} holds no prompt")
    return prompts


def _pictures(settings: Settings) -> tuple[Image | None, Image | None]:
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
