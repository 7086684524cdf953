"""What diffusers and its neighbours do to a pipeline, each as something done and, where that makes sense, undone."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import accelerate
import diffusers
import pytest
import tomesd
import torch
from accelerate.hooks import remove_hook_from_submodules
from DeepCache import DeepCacheSDHelper
from diffusers.hooks import HookRegistry
from diffusers.hooks.layer_skip import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

import agentsd
from agentsd import Agent, AgentSDConfig, Merge, Phase
from families import FAMILIES, Family

# Agent attention in the first of two steps and merging in the second, whichever two steps a pipeline takes: from the
# noise, from an image, or the last of many.
CONFIG = AgentSDConfig(
    phases=(
        Phase(until=0.5008, attention=Agent()),  # SDXL has a step at 0.5005, LCM at 0.501
        Phase(until=0.6, attention=Merge()),
        Phase(until=0.9, attention=Agent()),
        Phase(attention=Merge()),
    )
)

Do = Callable[[Any], Any]


def fits(pipe: Any) -> str:
    """Nothing stands against it."""
    return ""


@dataclass(frozen=True)
class Operation:
    """Something done to a pipeline.

    Attributes:
        name: the head of its column in the table.
        do: does it and returns the pipeline to draw with.
        undo: takes it back and returns the pipeline to draw with; None where there is no taking back.
        unfit: why it does not apply to a pipeline; empty where it does.
        arguments: what the pipeline is to be called with besides, given the pipeline and the arguments it has.
        refusal: a pattern for the sentence that refuses operation and acceleration together; empty: they work together.
        keeps: the image remains what it was but for rounding.
        compiles: makes graphs of the UNet, which takes longer than everything else together.
    """

    name: str
    do: Do
    undo: Do | None = None
    unfit: Callable[[Any], str] = fits
    arguments: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None
    refusal: str = ""
    keeps: bool = False
    compiles: bool = False


def lacks(method: str, what: str) -> Callable[[Any], str]:
    """Reason: the pipeline has no such method."""
    return lambda pipe: "" if hasattr(pipe, method) else f"this pipeline has no {what}"


def replaces_ip_adapter(pipe: Any) -> str:
    """Reason: diffusers replaces the IP-Adapter's processors, which no pipeline survives."""
    return "replaces the IP-Adapter's processors in diffusers itself" if has_ip_adapter(pipe) else ""


def either(*reasons: Callable[[Any], str]) -> Callable[[Any], str]:
    """The first reason that there is."""
    return lambda pipe: next(filter(None, (reason(pipe) for reason in reasons)), "")


def has_ip_adapter(pipe: Any) -> bool:
    return (
        pipe.unet.config.encoder_hid_dim_type == "ip_image_proj"
        if "encoder_hid_dim_type" in pipe.unet.config
        else False
    )


def networks(pipe: Any) -> list[Any]:
    """The UNet and the ControlNets, which compute in each step."""
    control = getattr(pipe, "controlnet", None)
    return [pipe.unet, *getattr(control, "nets", [control] if control is not None else [])]


def in_place(function: Callable[[Any], Any]) -> Do:
    """An operation that changes the pipeline it is given."""

    def do(pipe: Any) -> Any:
        function(pipe)
        return pipe

    return do


def lora(pipe: Any) -> dict[str, Tensor]:
    """The weights of a LoRA on every attention of the UNet, as a file holds them."""
    generator = torch.Generator().manual_seed(21)
    weights = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                linear = module.get_submodule(part)
                for side, shape in (("A", (2, linear.in_features)), ("B", (linear.out_features, 2))):
                    weights[f"unet.{name}.{part}.lora_{side}.weight"] = torch.randn(shape, generator=generator) * 0.3
    return weights


def load_lora(pipe: Any) -> None:
    pipe.load_lora_weights(lora(pipe), adapter_name="test")


def fuse_lora(pipe: Any) -> None:
    load_lora(pipe)
    pipe.fuse_lora()


def unfuse_lora(pipe: Any) -> None:
    pipe.unfuse_lora()
    pipe.unload_lora_weights()


IMAGE_WIDTH = 8


def load_ip_adapter(pipe: Any) -> None:
    """Load an IP-Adapter of four tokens; its image is given as an embedding."""
    generator = torch.Generator().manual_seed(22)
    width = pipe.unet.config.cross_attention_dim
    attention = {}
    layers = [name for name in pipe.unet.attn_processors if "attn2" in name and "motion_modules" not in name]
    for index, name in enumerate(layers):
        attn = pipe.unet.get_submodule(name.removesuffix(".processor"))
        for part in ("k", "v"):
            weight = torch.randn(attn.inner_dim, width, generator=generator)
            attention[f"{2 * index + 1}.to_{part}_ip.weight"] = weight
    projection = {
        "proj.weight": torch.randn(4 * width, IMAGE_WIDTH, generator=generator),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    weights = {"image_proj": projection, "ip_adapter": attention}
    pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)


def image_embedding(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    guided = arguments.get("guidance_scale", 7.5) > 1 and not isinstance(pipe, diffusers.LatentConsistencyModelPipeline)
    embedding = torch.randn(1, 1, IMAGE_WIDTH, generator=torch.Generator().manual_seed(23))
    return {"ip_adapter_image_embeds": [torch.cat([0 * embedding, embedding]) if guided else embedding]}


def ip_adapter_unfit(pipe: Any) -> str:
    if isinstance(pipe, diffusers.StableDiffusionInstructPix2PixPipeline):
        return "diffusers does not hand the image embedding on in this pipeline"
    return "an IP-Adapter is loaded already" if has_ip_adapter(pipe) else ""


def there_and_back(pipe: Any) -> None:
    """Move the networks to the meta device, which knows shapes alone, and back to the CPU with their weights."""
    for net in networks(pipe):
        weights = copy.deepcopy(net.state_dict())
        net.to("meta")
        net.to_empty(device="cpu").load_state_dict(weights)
    pipe.to("cpu")


def sequential_offload(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does to the UNet; diffusers refuses to do it without a GPU."""
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))


def group_offload(pipe: Any) -> None:
    try:
        for net in networks(pipe):
            net.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    except RuntimeError as error:
        if "Cannot access accelerator" not in str(error):
            raise
        pytest.skip("older versions of diffusers have no group offload without an accelerator")


def outermost_transformer(unet: Any) -> str:
    """The last spatial transformer of the up side."""
    index = max(i for i, block in enumerate(unet.up_blocks) if hasattr(block, "attentions"))
    return f"up_blocks.{index}.attentions.0"


def perturb(pipe: Any) -> None:
    """The hook of diffusers' guiders of the PAG kind, on a layer that is accelerated otherwise."""
    layer = f"{outermost_transformer(pipe.unet)}.transformer_blocks"
    options = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
    apply_layer_skip(pipe.unet, LayerSkipConfig(indices=[0], fqn=layer, **options))


def unperturb(pipe: Any) -> None:
    HookRegistry.check_if_exists_or_initialize(pipe.unet).remove_hook("layer_skip_hook", recurse=True)


class Graphs:
    """A backend of torch.compile that runs each graph as it was traced, and counts the runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


# One for all: what is compiled once serves every network of the same structure.
graphs = Graphs()


def compile_unet(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend=graphs)


def restore_unet(pipe: Any) -> None:
    pipe.unet = pipe.unet._orig_mod


def end_compilation(pipe: Any) -> None:
    for module in pipe.unet.modules():
        module._compiled_call_impl = None


def needs_its_scheduler(pipe: Any) -> str:
    lcm = isinstance(pipe, diffusers.LatentConsistencyModelPipeline)
    return "this pipeline works with its own scheduler only" if lcm else ""


def numpy_only(pipe: Any) -> str:
    numpy = isinstance(pipe, diffusers.LDMTextToImagePipeline)
    return "this pipeline makes a NumPy array of its image, and NumPy has no bfloat16" if numpy else ""


def other_scheduler(pipe: Any, **overrides: Any) -> None:
    """Euler has timesteps that are floats, DDIM integers."""
    euler = isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    kind = diffusers.EulerDiscreteScheduler if euler else diffusers.DDIMScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **overrides)


def deepcache(pipe: Any) -> None:
    pipe.deepcache = DeepCacheSDHelper(pipe=pipe)
    pipe.deepcache.set_params(cache_interval=2, cache_branch_id=0)
    pipe.deepcache.enable()


def merge_tokens(pipe: Any) -> None:
    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=8, use_rand=False)


def tomesd_unfit(pipe: Any) -> str:
    motion = isinstance(pipe.unet, diffusers.UNetMotionModel)
    return "tomesd takes the temporal layers for spatial ones, with or without agentsd" if motion else ""


def second_pipeline(pipe: Any) -> Any:
    twin = type(pipe).from_pipe(pipe)
    twin.set_progress_bar_config(disable=True)
    return twin


freeu = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}


def operations() -> tuple[Operation, ...]:
    no_lora = lacks("load_lora_weights", "LoRA loader")
    no_mixin = lacks("enable_freeu", "such method")
    return (
        Operation("load LoRA", in_place(load_lora), in_place(lambda pipe: pipe.unload_lora_weights()), no_lora),
        Operation("fuse LoRA", in_place(fuse_lora), in_place(unfuse_lora), no_lora),
        Operation(
            "load IP-Adapter",
            in_place(load_ip_adapter),
            in_place(lambda pipe: pipe.unload_ip_adapter()),
            either(lacks("load_ip_adapter", "IP-Adapter loader"), ip_adapter_unfit),
            image_embedding,
        ),
        Operation(
            "attention slicing",
            in_place(lambda pipe: pipe.enable_attention_slicing("max")),
            in_place(lambda pipe: pipe.disable_attention_slicing()),
            replaces_ip_adapter,
            keeps=True,
        ),
        Operation(
            "set processors",
            in_place(lambda pipe: pipe.unet.set_attn_processor(AttnProcessor())),
            in_place(lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0())),
            replaces_ip_adapter,
            keeps=True,
        ),
        Operation(
            "fuse QKV",
            in_place(lambda pipe: pipe.fuse_qkv_projections(vae=False)),
            in_place(lambda pipe: pipe.unfuse_qkv_projections(vae=False)),
            either(no_mixin, replaces_ip_adapter),
            keeps=True,
        ),
        Operation("perturb a layer", in_place(perturb), in_place(unperturb)),
        Operation(
            "FreeU",
            in_place(lambda pipe: pipe.enable_freeu(**freeu)),
            in_place(lambda pipe: pipe.disable_freeu()),
            no_mixin,
        ),
        Operation(
            "float64",
            in_place(lambda pipe: pipe.to(torch.float64)),
            in_place(lambda pipe: pipe.to(torch.float32)),
        ),
        Operation(
            "bfloat16",
            in_place(lambda pipe: pipe.to(torch.bfloat16)),
            in_place(lambda pipe: pipe.to(torch.float32)),
            numpy_only,
        ),
        Operation("meta device and back", in_place(there_and_back), keeps=True),
        Operation(
            "channels last",
            in_place(lambda pipe: pipe.unet.to(memory_format=torch.channels_last)),
            in_place(lambda pipe: pipe.unet.to(memory_format=torch.contiguous_format)),
            keeps=True,
        ),
        Operation(
            "model offload",
            in_place(lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
            in_place(lambda pipe: pipe.remove_all_hooks()),
            lambda pipe: "" if pipe.model_cpu_offload_seq else "this pipeline names no order of its models",
            keeps=True,
        ),
        Operation(
            "sequential offload",
            in_place(sequential_offload),
            in_place(lambda pipe: remove_hook_from_submodules(pipe.unet)),
            keeps=True,
        ),
        Operation("group offload", in_place(group_offload), keeps=True),
        Operation("compile the UNet", in_place(compile_unet), in_place(restore_unet), keeps=True, compiles=True),
        Operation(
            "compile in place",
            in_place(lambda pipe: pipe.unet.compile(backend=graphs)),
            in_place(end_compilation),
            keeps=True,
            compiles=True,
        ),
        Operation(
            "compile repeated blocks",
            in_place(lambda pipe: pipe.unet.compile_repeated_blocks(backend=graphs)),
            in_place(end_compilation),
            lambda pipe: "" if pipe.unet._repeated_blocks else "diffusers names no repeated blocks of this UNet",
            keeps=True,
            compiles=True,
        ),
        Operation("another scheduler", in_place(other_scheduler), unfit=needs_its_scheduler),
        Operation(
            "another noise schedule",
            in_place(lambda pipe: other_scheduler(pipe, num_train_timesteps=500)),
            unfit=needs_its_scheduler,
        ),
        Operation("deepcopy", copy.deepcopy, keeps=True),
        Operation("components in a second pipeline", second_pipeline, keeps=True),
        Operation(
            "DeepCache",
            in_place(deepcache),
            in_place(lambda pipe: pipe.deepcache.disable()),
        ),
        Operation(
            "tomesd",
            in_place(merge_tokens),
            in_place(tomesd.remove_patch),
            tomesd_unfit,
            refusal="merges their tokens",
        ),
    )


OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in operations()}


def called(pipe: Any, **arguments: Any) -> Any:
    """Call a pipeline; skip the test where transformers has no such text encoder."""
    try:
        return pipe(**arguments)
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        pytest.skip("older versions of transformers have no text encoder in float64")


class Called:
    """A pipeline that is called with other arguments than it is given."""

    def __init__(self, pipe: Any, operation: Operation | None = None) -> None:
        self._pipe = pipe
        self._operation = operation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def __call__(self, **arguments: Any) -> Any:
        # One step in the phase of agent attention and one in that of merging: enough here, and cheaper.
        if arguments["num_inference_steps"] in (3, 4):
            arguments["num_inference_steps"] -= 1
        if self._operation and self._operation.arguments:
            arguments |= self._operation.arguments(self._pipe, arguments)
        return called(self._pipe, **arguments)


def draw(family: Family, pipe: Any, operation: Operation | None = None, seed: int = 0) -> Tensor:
    """The family's image by a pipeline on which `operation` is in force."""
    return family.draw(Called(pipe, operation), seed)


@cache
def images(name: str) -> tuple[Tensor, Tensor]:
    """The stock image of a family and the accelerated one, each by a pipeline that nothing else was done to."""
    family = FAMILIES[name]
    return draw(family, family.build()), draw(family, agentsd.apply(family.build(), CONFIG))


AGAIN, DISABLED, REMOVED, SAVED, STOPPED = (
    "apply again",
    "disabled",
    "remove twice",
    "save and reload",
    "exception in a run",
)
COLUMNS = [*OPERATIONS, AGAIN, DISABLED, REMOVED, SAVED, STOPPED]
