"""Loading Stable Diffusion pipelines: the embedded demo model, a hub id, a diffusers folder or a single file."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES |= {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# name: diffusers class, what replaces fields of the model's scheduler configuration, name in the common web UIs
SCHEDULERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ddim": ("DDIMScheduler", {}, "DDIM"),
    "ddpm": ("DDPMScheduler", {}, "DDPM"),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, "PLMS"),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}, "PLMS"),
    "euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}, "Euler"),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}, "Euler a"),
    "heun": ("HeunDiscreteScheduler", {"use_karras_sigmas": False}, "Heun"),
    "lms": ("LMSDiscreteScheduler", {"use_karras_sigmas": False}, "LMS"),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": False}, "DPM++ 2M"),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M Karras"),
    "unipc": ("UniPCMultistepScheduler", {}, "UniPC"),
    "lcm": ("LCMScheduler", {}, "LCM"),
}
PICKLED = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load(
    model: str | Path = "demo",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    allow_pickle: bool = False,
    config: str | Path | None = None,
) -> "DiffusionPipeline":
    """Load a Stable Diffusion pipeline.

    Args:
        model: ``"demo"`` for the model that ships with the package, a hub id such as ``"org/name"``, a folder in the
            diffusers layout, or a single ``.safetensors`` file.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; by default float16 on CUDA and float32 elsewhere.
        device: by default ``"cuda"`` where there is one, else ``"mps"``, else ``"cpu"``.
        allow_pickle: also load pickled weights, which can run code of whoever made them.
        config: for a single file, a folder or hub id in the diffusers layout whose configuration and tokenizer it
            uses; by default what diffusers names for this kind of file, from the hub or its local cache.

    Raises:
        ValueError: in one sentence, if the model cannot be found or loaded.

    Example:
        >>> pipe = load()
        >>> image = pipe("a large red circle on a striped green background").images[0]
    """
    device = find_device(device)
    path = find(model, allow_pickle=allow_pickle) or download(str(model), allow_pickle=allow_pickle)
    options = {_dtype_argument(): find_dtype(dtype, device), "use_safetensors": None if allow_pickle else True}
    pipe = _load_folder(path, options) if path.is_dir() else _load_file(path, config, options)
    if not hasattr(pipe, "unet"):
        raise ValueError(f"model {str(model)!r} is a {type(pipe).__name__}, which has no UNet to accelerate")
    return pipe.to(device)


def _dtype_argument() -> str:
    from diffusers import __version__

    return "dtype" if [int(part) for part in __version__.split(".")[:2]] >= [0, 40] else "torch_dtype"


def find(model: str | Path, *, allow_pickle: bool = False) -> Path | None:
    """Where a model lies, None for a hub id; ValueError for what can be seen to be wrong without loading."""
    from agentsd.demo import MODEL

    path = MODEL if model == "demo" else Path(model).expanduser()
    if path.is_dir():
        _check_folder(path, allow_pickle)
    elif path.is_file():
        if path.suffix in PICKLED and not allow_pickle:
            _refuse_pickle(path)
        if path.suffix not in (".safetensors", *PICKLED):
            raise ValueError(f"model {str(model)!r} is neither a .safetensors file nor a folder with a pipeline")
        check_safetensors(path)
    elif isinstance(model, str) and _HUB_ID.fullmatch(model) and path.suffix not in (".safetensors", *PICKLED):
        return None
    else:
        raise ValueError(
            f"unknown model {str(model)!r}: it must be 'demo', a hub id such as org/name, an existing folder or an "
            "existing .safetensors file"
        )
    return path


def check_safetensors(path: Path) -> None:
    """ValueError if a file that claims to be safetensors is not, or is cut off."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file ({one_line(error)})") from error


def _refuse_pickle(path: Path) -> NoReturn:
    raise ValueError(f"{path} is pickled and may run code when loaded; allow_pickle (--allow-pickle) permits it")


def _weights(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*")) if file.suffix in (".safetensors", *PICKLED)]


def _check_folder(folder: Path, allow_pickle: bool) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"folder {folder} holds no pipeline: there is no model_index.json in it")
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
        names = [name for name, entry in entries.items() if isinstance(entry, list) and entry[0] is not None]
    except (ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{index} is not a pipeline index ({one_line(error)})") from error
    for weights in (_weights(folder / name) for name in names):
        sound = [file for file in weights if file.suffix == ".safetensors"]
        if weights and not sound and not allow_pickle:
            _refuse_pickle(weights[0])
        for file in sound:
            check_safetensors(file)


def download(model: str, *, allow_pickle: bool = False) -> Path:
    """The folder of a hub id in the local cache, downloaded if need be."""
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        path = Path(DiffusionPipeline.download(model, use_safetensors=None if allow_pickle else True))
    except Exception as error:  # the hub's client raises many kinds, of several libraries
        if isinstance(error.__cause__ or error, RepositoryNotFoundError):
            raise ValueError(f"unknown model {model!r}: the hub has none of this name, or it is private") from error
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"model {model!r} is not on this machine and could not be downloaded ({reason})") from error
    _check_folder(path, allow_pickle)
    return path


def _load_folder(folder: Path, options: dict[str, Any]) -> "DiffusionPipeline":
    from diffusers import DiffusionPipeline

    unet = [file.name for file in (folder / "unet").glob("*.safetensors")]
    if unet and all(".fp16." in name for name in unet):
        options = options | {"variant": "fp16"}
    try:
        return DiffusionPipeline.from_pretrained(folder, **options)
    except Exception as error:  # whatever is wrong with a model's files surfaces in any of a dozen kinds
        _fail(folder, error)


def _load_file(path: Path, config: str | Path | None, options: dict[str, Any]) -> "DiffusionPipeline":
    import diffusers
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    try:
        source = config or fetch_diffusers_config(load_single_file_checkpoint(path))["pretrained_model_name_or_path"]
    except Exception as error:
        _fail(path, error)
    try:
        class_name = diffusers.DiffusionPipeline.load_config(str(source))["_class_name"]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} needs the configuration of {source}, which is not on this machine and could not be downloaded; "
            "config (--model-config) names a folder or hub id to take it from"
        ) from error
    try:
        return getattr(diffusers, class_name).from_single_file(str(path), config=str(source), **options)
    except Exception as error:
        _fail(path, error)


def _fail(path: Path, error: Exception) -> NoReturn:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        raise error
    raise ValueError(f"{path} could not be loaded as a Stable Diffusion pipeline ({one_line(error)})") from error


def for_task(pipe: "DiffusionPipeline", *, image: bool = False, mask: bool = False) -> "DiffusionPipeline":
    """The pipeline over the same modules that makes images from text, from an image, or within a mask."""
    if pipe.unet.config.in_channels == 9 and not mask:
        raise ValueError("the model is made for inpainting and needs an initial image and a mask")
    if not image and not mask and not re.search("Img2Img|Inpaint", type(pipe).__name__):
        return pipe
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

    auto = AutoPipelineForInpainting if mask else AutoPipelineForImage2Image if image else AutoPipelineForText2Image
    return auto.from_pipe(pipe)


def size_multiple(model: "DiffusionPipeline | Path | None") -> int:
    """What width and height must be a multiple of: the VAE's factor, and 8, which diffusers' pipelines need."""
    factor = 8
    if isinstance(model, Path):
        config = model / "vae" / "config.json"
        if config.is_file():
            values = json.loads(config.read_text(encoding="utf-8"))
            blocks = values.get("block_out_channels") or values.get("decoder_block_out_channels") or [0] * 4
            factor = 2 ** (len(blocks) - 1)
    elif model is not None:
        factor = model.vae_scale_factor
    return max(8, factor)


def default_size(pipe: "DiffusionPipeline") -> tuple[int, int]:
    """Width and height in pixels that the model was made for."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor


def find_device(device: str | torch.device | None = None) -> torch.device:
    """A device that exists; None is the best one there is."""
    backends = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    names = [name for name, is_there in backends.items() if is_there]
    try:
        found = torch.device(names[0] if device is None else device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        found = torch.device("meta")
    if found.type == "meta":
        raise ValueError(f"device {str(device)!r} does not exist here; there is {', '.join(names)}")
    return found


def find_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """A dtype by name; None is float16 on CUDA and float32 elsewhere."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES[dtype]


def check_scheduler(name: str) -> None:
    """ValueError unless a scheduler has this name and can run."""
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, not {name!r}")
    if name == "lms":
        _check_package("scheduler 'lms'", "scipy")


def _check_package(what: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what} needs the package {package}, which is not installed")


def set_scheduler(pipe: "DiffusionPipeline", name: str) -> None:
    """Replace the pipeline's scheduler by one of `SCHEDULERS`, with the noise schedule of the model kept."""
    import diffusers

    check_scheduler(name)
    class_name, overrides, _ = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, class_name).from_config(pipe.scheduler.config, **overrides)


def sampler_name(pipe: "DiffusionPipeline") -> str:
    """The pipeline's scheduler under the name the common web UIs give it, or its class name."""
    own = type(pipe.scheduler).__name__
    for class_name, overrides, name in SCHEDULERS.values():
        if own == class_name and overrides.items() <= dict(pipe.scheduler.config).items():
            return name
    return own


def set_attention_backend(pipe: "DiffusionPipeline", name: str) -> None:
    """Make the UNet's stock attention use `sdpa`, `xformers`, `sliced` or a diffusers attention backend."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    check_attention_backend(name)
    try:
        if name == "sdpa":
            pipe.unet.set_attn_processor(AttnProcessor2_0())
        elif name == "xformers":
            pipe.enable_xformers_memory_efficient_attention()
        elif name == "sliced":
            pipe.enable_attention_slicing()
        elif any(hasattr(processor, "_attention_backend") for processor in pipe.unet.attn_processors.values()):
            pipe.unet.set_attention_backend(name)
        else:
            raise ValueError(f"{type(pipe.unet).__name__} does not choose its attention by diffusers' backends")
    except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        others = "sdpa, sliced and, where installed, xformers can"
        raise ValueError(f"attention backend {name!r} cannot be used here: {one_line(error)}; {others}") from error


def check_attention_backend(name: str) -> None:
    """ValueError if an attention backend needs a package that is missing."""
    if name == "xformers":
        _check_package("attention backend 'xformers'", name)


def load_loras(pipe: "DiffusionPipeline", loras: Sequence[tuple[Path, float]]) -> None:
    """Load LoRA files or folders, each with its weight."""
    names = [f"lora_{index}" for index in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        file = check_lora(path)
        try:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        except Exception as error:  # as for models: any kind
            raise ValueError(f"LoRA {path} does not fit the model ({one_line(error)})") from error
    if loras:
        pipe.set_adapters(names, [weight for _, weight in loras])


def check_lora(path: Path) -> Path:
    """The safetensors file of a LoRA given as a file or a folder."""
    _check_package("LoRA", "peft")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file() or files[0].suffix != ".safetensors":
        raise ValueError(f"LoRA {path} must be a .safetensors file or a folder with exactly one")
    check_safetensors(files[0])
    return files[0]


def fingerprint(model: Path) -> str:
    """Ten digits of the SHA-256 of a single file, as the web UIs give it, or of a folder's UNet weights."""
    return sha256(*(_weights(model / "unet") or [model]))[:10]


def sha256(*files: Path) -> str:
    """Of the contents of files, one after another."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, shortened."""
    text = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split()).rstrip(".:")
    return text if len(text) <= 200 else text[:199] + "…"
