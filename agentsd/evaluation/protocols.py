"""What an evaluation measures, and on what: YAML files that say everything, so that a name is enough to repeat it."""

import csv
import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agentsd import checks
from agentsd.demo.scenes import Scene, held_out_prompts, sample
from agentsd.pipelines import DTYPES, SCHEDULERS

NETWORKS = ("inception", "pytorch-fid", "dinov2", "checker")
PAIRS = ("psnr", "ssim", "ms-ssim", "lpips", "checker")
ADHERENCE = ("clip", "attributes")
SUFFIXES = (".yaml", ".yml")
FOLDER = Path(__file__).parents[1] / "configs" / "protocols"


@dataclass(frozen=True)
class Prompts:
    """Where the prompts come from.

    Args:
        source: `scenes` are scenes of the embedded model with combinations held out of its training, `imagenet` the
            1,000 class names of ImageNet-1k, `captions` a file named on the command line.
        number: images to make for each method; image i is of prompt i modulo the number of prompts.
        template: text with `{}` where the class name or caption goes.
        seed: which scenes.
    """

    source: str
    number: int
    template: str = "{}"
    seed: int = 1

    def __post_init__(self) -> None:
        checks.choice("prompts.source", self.source, ("scenes", "imagenet", "captions"))
        checks.whole("prompts.number", self.number, 1)
        if not isinstance(self.template, str) or self.template.count("{}") != 1:
            checks.refuse("prompts.template", self.template, "text with {} in it once")
        checks.whole("prompts.seed", self.seed, 0)


@dataclass(frozen=True)
class Reference:
    """What the set of images is compared with.

    Args:
        source: `scenes` are rendered scenes as the prompts', `images` a folder (or FID statistics in an .npz file)
            named on the command line, `none` leaves such comparisons out.
        number: how many; None is every image of the folder.
        per_class: only the first so many images of each subfolder, in the order of their names.
        size: scale the shorter side to so many pixels and cut out the middle; None takes the images as they are.
        convert: take pictures that are not RGB too (ImageNet has grey ones); otherwise they are an error.
        seed: which scenes.
    """

    source: str = "none"
    number: int | None = None
    per_class: int | None = None
    size: int | None = None
    convert: bool = False
    seed: int = 2

    def __post_init__(self) -> None:
        checks.choice("reference.source", self.source, ("none", "scenes", "images"))
        for name in ("number", "per_class", "size"):
            checks.whole(f"reference.{name}", getattr(self, name), 1, optional=True)
        if self.source == "scenes" and self.number is None:
            raise ValueError("reference.number is missing; rendered scenes need a number")
        checks.flag("reference.convert", self.convert)
        checks.whole("reference.seed", self.seed, 0)


@dataclass(frozen=True)
class Scores:
    """What is measured of the images.

    Args:
        features: networks in whose features they are compared with the reference: `inception` (FID, KID, IS, precision
            and recall, by torch-fidelity), `pytorch-fid` (FID as that package feeds the same network), `dinov2`,
            `checker` (the embedded attribute checker).
        pairs: distances to the stock image of the same seed.
        adherence: `clip` is the CLIP score, `attributes` what the attribute checker reads from the image.
        clip, dinov2: hub ids of these networks.
        lpips: LPIPS's network, `alex`, `vgg` or `squeeze`.
        kid_subsets, kid_subset_size: of the kernel distance; a subset has at most as many as there are images.
        neighbours: of precision and recall.
        splits: of the inception score.
        bootstrap: resamples behind every interval.
        allow_singular: compute Fréchet distances from fewer images than features too.
    """

    features: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    adherence: tuple[str, ...] = ()
    clip: str = "openai/clip-vit-large-patch14"
    dinov2: str = "facebook/dinov2-large"
    lpips: str = "alex"
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    neighbours: int = 3
    splits: int = 10
    bootstrap: int = 1000
    allow_singular: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("features", NETWORKS), ("pairs", PAIRS), ("adherence", ADHERENCE)):
            object.__setattr__(self, name, checks.names(f"scores.{name}", getattr(self, name), allowed))
        for name in ("clip", "dinov2"):
            checks.text(f"scores.{name}", getattr(self, name))
        checks.choice("scores.lpips", self.lpips, ("alex", "vgg", "squeeze"))
        for name in ("kid_subsets", "neighbours", "splits", "bootstrap"):
            checks.whole(f"scores.{name}", getattr(self, name), 1)
        checks.whole("scores.kid_subset_size", self.kid_subset_size, 2)
        checks.flag("scores.allow_singular", self.allow_singular)


@dataclass(frozen=True)
class Protocol:
    """An evaluation.

    Args:
        name: the file's name without .yaml.
        description: what it is for.
        prompts: what to draw.
        methods: as `agentsd.methods` reads them, `name:key=value,key=value`; `stock` comes first.
        model: what `agentsd.pipelines.load` takes; None: named on the command line.
        seed: image i starts from seed + i.
        sampler: one of `agentsd.pipelines.SCHEDULERS`; None is the model's own.
        steps, guidance: of the sampler.
        width, height: in pixels; None is what the model was made for.
        dtype: of the model; None is float16 on CUDA and float32 elsewhere.
        batch: images made at once. Kernels round by it, so it belongs to the images' identity.
        reference: what the set of images is compared with.
        scores: what is measured of the images.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    name: str
    description: str
    prompts: Prompts
    methods: tuple[str, ...]
    model: str | None = None
    seed: int = 0
    sampler: str | None = None
    steps: int = 50
    guidance: float = 7.5
    width: int | None = None
    height: int | None = None
    dtype: str | None = None
    batch: int = 4
    reference: Reference = field(default_factory=Reference)
    scores: Scores = field(default_factory=Scores)

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", checks.names("methods", self.methods))
        if self.methods[:1] != ("stock",):
            raise ValueError(f"methods is {list(self.methods)}; its first must be stock, which the others compare with")
        checks.text("description", self.description)
        checks.text("model", self.model, optional=True)
        checks.choice("sampler", self.sampler, SCHEDULERS, optional=True)
        checks.choice("dtype", self.dtype, DTYPES, optional=True)
        for name in ("width", "height"):
            checks.whole(name, getattr(self, name), 8, optional=True)
        for name, least in (("seed", 0), ("steps", 1), ("batch", 1)):
            checks.whole(name, getattr(self, name), least)
        checks.number("guidance", self.guidance, 0)
        if self.reference.source == "none" and (features := list(self.scores.features)):
            raise ValueError(f"scores.features is {features}; without a reference there is nothing to compare with")
        scenes = self.prompts.source == "scenes"
        if not scenes and ("attributes" in self.scores.adherence or self.reference.source == "scenes"):
            raise ValueError(f"prompts.source is {self.prompts.source!r}; attributes and rendered scenes need scenes")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and mappings."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self))))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def replace(self, **values: Any) -> "Protocol":
        return dataclasses.replace(self, **values)


def names() -> tuple[str, ...]:
    """The protocols that come with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load(name: str | Path) -> Protocol:
    """A protocol of the package by its name, or one in a YAML file of the same form.

    A file may say `base: NAME`, or a file beside it: then it only says what is different.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no such protocol, or a key or value is not allowed; the message names the file.
    """
    path = _path(name)
    values = _read(path)
    try:
        return from_dict({"name": path.stem, **values})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_dict(values: Mapping[str, Any]) -> Protocol:
    """The inverse of `Protocol.to_dict`."""
    checks.known_fields("a protocol", values, Protocol)
    parts: dict[str, Any] = {}
    for key, kind in (("prompts", Prompts), ("reference", Reference), ("scores", Scores)):
        part = values.get(key, {})
        if not isinstance(part, Mapping):
            checks.refuse(key, part, "a mapping")
        checks.known_fields(key, part, kind)
        parts[key] = kind(**part)
    return Protocol(**{**values, **parts})


def _path(name: str | Path) -> Path:
    if Path(name).suffix in SUFFIXES:
        return Path(name)
    if str(name) not in names():
        raise ValueError(f"protocol is {str(name)!r}; it must be one of {', '.join(names())}, or a .yaml file")
    return FOLDER / f"{name}.yaml"


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a protocol: it must be a mapping of field names to values")
    base = values.pop("base", None)
    if base is None:
        return values
    try:
        below = path.parent / base if Path(base).suffix in SUFFIXES else _path(base)
    except ValueError as error:
        raise ValueError(f"{path}: base: {error}") from None
    if below.resolve() in [file.resolve() for file in (path, *seen)]:
        raise ValueError(f"{path}: base is {base!r}, which builds on this file")
    inherited = _read(below, (path, *seen))
    for key, value in values.items():
        old = inherited.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            # The fields of one source have no effect on another.
            value = old | value if value.get("source") in (None, old.get("source")) else value
        inherited[key] = value
    return inherited


def prompts(protocol: Protocol, captions: Path | None = None) -> list[str]:
    """The prompt of each image.

    Raises:
        ValueError: the protocol needs a caption file, or there is none in it.
    """
    source = protocol.prompts
    if source.source == "scenes":
        texts: Sequence[str] = held_out_prompts(source.number, source.seed)
    elif source.source == "imagenet":
        from torchvision.models import ResNet50_Weights

        texts = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    elif captions is None:
        raise ValueError(f"protocol {protocol.name} draws the captions of a file, which --captions names")
    else:
        texts = read_captions(captions)
    return [source.template.replace("{}", texts[index % len(texts)]) for index in range(source.number)]


def read_captions(path: Path) -> list[str]:
    """Captions of a text file (one on each line), a table (.tsv, column `Prompt`) or COCO's annotations (.json).

    Of COCO's captions, each image has its first, in the order of the images' ids.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            first: dict[int, str] = {}
            for row in sorted(json.loads(text)["annotations"], key=lambda row: (row["image_id"], row["id"])):
                first.setdefault(row["image_id"], " ".join(row["caption"].split()))
            captions = list(first.values())
        elif path.suffix == ".tsv":
            captions = [row["Prompt"].strip() for row in csv.DictReader(text.splitlines(), delimiter="\t")]
        else:
            captions = [line.strip() for line in text.splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of captions ({type(error).__name__}: {error})") from None
    captions = [caption for caption in captions if caption]
    if not captions:
        raise ValueError(f"{path} holds no caption")
    return captions


def reference_scenes(reference: Reference) -> list[Scene]:
    """The scenes that are rendered for reference: as the prompts', but others."""
    rng = random.Random(f"reference/{reference.seed}")
    return [sample(rng, held_out=True) for _ in range(reference.number or 0)]
