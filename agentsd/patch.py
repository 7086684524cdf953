"""Putting the acceleration on a model and taking it off: finding layers, hooks, restoring."""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from agentsd.config import AgentSDConfig, AgentSDWarning, Phase
from agentsd.merging import destinations, step_key
from agentsd.processor import AgentSDProcessor, Block, Plan, obstacle
from agentsd.reuse import Reuse
from agentsd.schedule import Clock, phase_at, progress

if TYPE_CHECKING:
    from diffusers.models.attention import BasicTransformerBlock

    from agentsd.refine import Refinement

Model = TypeVar("Model")


@dataclass(frozen=True)
class Layer:
    """A spatial self-attention layer of a model."""

    name: str
    level: int
    block: "BasicTransformerBlock"


def block_levels(model: nn.Module) -> dict[str, int]:
    """The level of each block: 1 at the latent grid, one more after a downsampler, one less after an upsampler."""
    levels, level = {}, 1
    for index, block in enumerate(getattr(model, "down_blocks", ())):
        levels[f"down_blocks.{index}"] = level
        level += any(name.endswith("downsamplers") for name, _ in block.named_children())
    levels["mid_block"] = level
    for index, block in enumerate(getattr(model, "up_blocks", ())):
        levels[f"up_blocks.{index}"] = level
        level -= any(name.endswith("upsamplers") for name, _ in block.named_children())
    return levels


def find_layers(model: nn.Module) -> list[Layer]:
    """Every spatial self-attention layer, in the order of the modules; temporal ones are not spatial."""
    # Imported here: diffusers' model classes bring transformers with them, which `import agentsd` should not.
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    levels = block_levels(model)
    layers = []
    for name, module in model.named_modules():
        part = next((part for part in levels if name.startswith(part + ".")), None)
        if isinstance(module, Transformer2DModel) and part is not None:
            for index, block in enumerate(module.transformer_blocks):
                if isinstance(block, BasicTransformerBlock) and not block.only_cross_attention:
                    layers.append(Layer(f"{name}.transformer_blocks.{index}.attn1", levels[part], block))
    return layers


def other_self_attention(model: nn.Module) -> list[str]:
    """The classes whose attention among tokens is none of the layers that `find_layers` finds."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention

    modules = dict(model.named_modules())
    known = {layer.name for layer in find_layers(model)}
    owners = set()
    for name, module in modules.items():
        if name in known or not isinstance(module, Attention):
            continue
        if module.is_cross_attention and module.added_kv_proj_dim is None:
            continue
        while name and isinstance(modules[name], Attention | nn.ModuleList | BasicTransformerBlock):
            name = name.rpartition(".")[0]
        owners.add(type(modules[name]).__name__)
    return sorted(owners)


def level_grid(sample: tuple[int, int], level: int) -> tuple[int, int]:
    """Height and width of the token grid of a level: each downsampler halves, rounding up."""
    scale = 1 << (level - 1)
    return -(-sample[0] // scale), -(-sample[1] // scale)


class Patch:
    """The acceleration of one UNet or ControlNet: its layers, its hooks and what the call in progress is to do."""

    def __init__(self, model: nn.Module, config: AgentSDConfig, pipe: Any = None) -> None:
        self.model = model
        self.config = config
        # Its scheduler may be swapped. Not owned: a copy of the model is not to copy the pipeline.
        self.pipe = weakref.ref(pipe) if hasattr(pipe, "scheduler") else lambda: None
        self.enabled = True
        self.clock = Clock()
        self.plans: dict[int, Plan] = {}
        self.blocks: dict[str, Block] = {}
        self.left_alone: dict[str, str] = {}
        self.sample: tuple[int, int] | None = None
        self.layers = find_layers(model)
        self.finest = min((layer.level for layer in self.layers), default=0)
        self.parts = {phase: self.on_levels(phase) for phase in config.phases}
        covered = {level for parts in self.parts.values() for level, part in parts.items() if part.acts}
        self.covered = [layer for layer in self.layers if layer.level in covered]
        present = sorted({layer.level for layer in self.layers})
        if not self.layers:
            others = other_self_attention(model)
            why = f"; that of {', '.join(others)} is not covered" if others else ""
            raise ValueError(f"{type(model).__name__} has no spatial self-attention layer to accelerate{why}")
        if not self.covered and any(phase.acts for phase in config.phases):
            asked = [list(phase.levels or ()) for phase in config.phases if phase.acts]
            raise ValueError(f"levels is {asked}; {type(model).__name__} has self-attention at levels {present}")
        self.refinements = self.read_refinements()
        self.reuse: Reuse | None = None
        if config.reuses:
            self.reuse = Reuse(model, block_levels(model), config, self.parts, self.blocks)
        # Plain Python beside a compiled model. Unlike the function that torch.compiler.disable makes of a method, a
        # partial is copied with the model.
        before_call = partial(torch.compiler.disable(Patch.before_call), self)
        self.handles: list[RemovableHandle] = []
        self.wrap_all()
        self.handles.append(model.register_forward_pre_hook(before_call, with_kwargs=True))
        if self.reuse:
            self.reuse.install()
            self.handles.append(model.register_forward_hook(partial(torch.compiler.disable(Reuse.end), self.reuse)))

    def on_levels(self, phase: Phase) -> dict[int, Phase]:
        """The levels of this model that a phase covers, and what it is there."""
        asked = (0,) if phase.levels is None else phase.levels
        return {level if level > 0 else self.finest - level: phase.on(level) for level in asked}

    def wrap(self, layer: Layer) -> str | None:
        """Put the acceleration around the processor that the layer has now; or say why it has to be left alone."""
        attn = layer.block.attn1
        inner = attn.processor
        if isinstance(inner, AgentSDProcessor):
            if inner.block is self.blocks.get(layer.name):
                return None
            inner = inner.inner
        reason = obstacle(attn, inner)
        if reason is None:
            if layer.name not in self.blocks:
                phases = tuple(parts[layer.level] for parts in self.parts.values() if layer.level in parts)
                block = self.blocks[layer.name] = Block(self.plans, layer.level, phases)
                self.handles += block.hook(layer.block)
            attn.set_processor(self.processor(inner, layer.name))
        return reason

    def read_refinements(self) -> "dict[str, Refinement]":
        """The refinements of `refine` by the names of their layers; a ControlNet has none."""
        if self.config.refine is None or not is_unet(self.model):
            return {}
        from agentsd.refine import fitting, load_refinements

        return fitting(load_refinements(self.config.refine), self)

    def processor(self, inner: Any, name: str) -> AgentSDProcessor:
        """The processor of a layer around its own."""
        if name not in self.refinements:
            return AgentSDProcessor(inner, self.blocks[name])
        from agentsd.refine import RefinedProcessor

        return RefinedProcessor(inner, self.blocks[name], self.refinements[name])

    def wrap_all(self) -> None:
        """Wrap every covered layer whose processor is not ours: IP-Adapters, xformers and slicing bring their own.

        Warns of layers that have to be left alone, once for each reason.
        """
        from diffusers.models.attention import BasicTransformerBlock

        kind = type(self.model).__name__
        for layer in self.covered:
            if type(layer.block).forward is not BasicTransformerBlock.forward:
                raise ValueError(
                    f"{kind} has transformer blocks of class {type(layer.block).__name__}: something else, such as "
                    "tomesd, merges their tokens; take it off, or call agentsd.remove(model)"
                )
        left_alone = {layer.name: reason for layer in self.covered if (reason := self.wrap(layer))}
        names = ", ".join(sorted(set(left_alone.values())))
        if self.covered and not self.blocks:
            raise ValueError(f"{kind} has no self-attention layer that can be accelerated: {names} is not known here")
        if left_alone and left_alone != self.left_alone:
            warnings.warn(
                f"agentsd leaves {len(left_alone)} of {len(self.covered)} covered layers of {kind} alone because of "
                f"{names}; agentsd.describe(model) lists them",
                AgentSDWarning,
                stacklevel=2,
            )
        self.left_alone = left_alone

    def before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: decide what each level does in this call."""
        self.plans.clear()
        if not self.enabled:
            if self.reuse:
                self.reuse.forget()
            return
        self.wrap_all()
        sample: Tensor = args[0] if args else kwargs["sample"]
        timestep = self.clock.read(args[1] if len(args) > 1 else kwargs["timestep"])
        scheduler = getattr(self.pipe(), "scheduler", None)
        steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)
        phase = phase_at(self.config.phases, progress(timestep, steps))
        self.sample = (sample.shape[-2], sample.shape[-1])
        for refinement in self.refinements.values():
            refinement.to(sample.device)
        key = step_key(self.config.seed, timestep) if self.config.use_rand else None
        for level, part in self.parts[phase].items():
            grid = level_grid(self.sample, level)
            if part.acts and part.pays_on(grid):
                places = destinations(grid, part.cell_on(grid), key, sample.device)
                self.plans[level] = Plan(part, self.config.ratio_of(part), grid, places)
        if self.reuse:
            text = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
            self.reuse.begin(phase, timestep, steps, self.clock, sample, text)

    def remove(self) -> None:
        """Give every layer its processor back and take the hooks off."""
        self.plans.clear()
        if self.reuse:
            self.reuse.remove()
        for handle in self.handles:
            handle.remove()
        for layer in self.covered:
            if isinstance(processor := layer.block.attn1.processor, AgentSDProcessor):
                layer.block.attn1.set_processor(processor.inner)
        # Where fuse_qkv_projections keeps the processors that unfuse_qkv_projections puts back.
        kept = getattr(self.model, "original_attn_processors", None) or {}
        kept.update({name: p.inner for name, p in kept.items() if isinstance(p, AgentSDProcessor)})


def networks(model: Any, controlnet: bool = True) -> list[nn.Module]:
    """The UNet and the ControlNets of a pipeline, or the network itself."""
    if isinstance(model, nn.Module):
        nets = getattr(model, "nets", None)
        return list(nets) if isinstance(nets, nn.ModuleList) else [model]
    found = [net for name in ("unet", "controlnet") if isinstance(net := getattr(model, name, None), nn.Module)]
    if not found:
        raise ValueError(
            f"model is a {type(model).__name__}; it must be a diffusers pipeline with a UNet, a UNet or a ControlNet"
        )
    return [net for part in (found if controlnet else found[:1]) for net in networks(part)]


def is_unet(net: nn.Module) -> bool:
    """Whether a network is a UNet, not a ControlNet."""
    return hasattr(net, "up_blocks")


def stock_module(net: nn.Module) -> nn.Module:
    """The module itself, where torch.compile has wrapped it."""
    return getattr(net, "_orig_mod", net)


def patch_of(net: nn.Module) -> Patch | None:
    """The patch on a network, found by its hook."""
    for hook in stock_module(net)._forward_pre_hooks.values():
        if isinstance(hook, partial) and hook.args and isinstance(patch := hook.args[0], Patch):
            return patch
    return None


def apply(model: Model, config: AgentSDConfig | str | None = None, /, **overrides: Any) -> Model:
    """Accelerate the self-attention of a model. Applying again replaces the configuration.

    Args:
        model: a diffusers pipeline with a UNet (its ControlNets are accelerated too, unless `controlnet=False`), a
            UNet or a ControlNet.
        config: the configuration, or the name of a preset; None is `AgentSDConfig()`, AgentSD as published.
        **overrides: fields of the configuration to replace, for example `ratio=0.5`.

    Returns:
        The same model.

    Raises:
        ValueError: a value is out of range, the model has no layer that the configuration covers, or `refine` does not
            fit it.

    Example:
        ```python
        pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        agentsd.apply(pipe, ratio=0.4)
        image = pipe("a photo of an astronaut riding a horse on mars").images[0]
        agentsd.remove(pipe)
        ```
    """
    if isinstance(config, str):
        config = AgentSDConfig.from_preset(config)
    config = (config or AgentSDConfig()).replace(**overrides)
    nets = [stock_module(net) for net in networks(model, config.controlnet)]
    if config.refine and not any(map(is_unet, nets)):
        raise ValueError(f"refine is {config.refine!r}; it is for a UNet, not for a {type(nets[0]).__name__}")
    previous = [(net, patch) for net in map(stock_module, networks(model)) if (patch := patch_of(net))]
    remove(model)
    done: list[nn.Module] = []
    try:
        for net in nets:
            Patch(net, config, model)
            done.append(net)
    except ValueError:
        for net in done:
            remove(net)
        for net, patch in previous:
            Patch(net, patch.config, patch.pipe())
        raise
    return model


def remove(model: Model) -> Model:
    """Take the acceleration off: the model is stock again, bit for bit. Does nothing where it is not applied."""
    for net in networks(model):
        if patch := patch_of(net):
            patch.remove()
    return model


def is_applied(model: Any) -> bool:
    """Whether any network of the model is accelerated."""
    return any(patch_of(net) for net in networks(model))


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Context in which an accelerated model computes as stock."""
    patches = [patch for net in networks(model) if (patch := patch_of(net))]
    before = [patch.enabled for patch in patches]
    try:
        for patch in patches:
            patch.enabled = False
        yield model
    finally:
        for patch, enabled in zip(patches, before, strict=True):
            patch.enabled = enabled


@contextmanager
def applied(model: Model, config: AgentSDConfig | str | None = None, /, **overrides: Any) -> Iterator[Model]:
    """Context in which a model is accelerated; afterwards it is what it was before."""
    previous = [(net, patch.config, patch.pipe()) for net in networks(model) if (patch := patch_of(net))]
    apply(model, config, **overrides)
    try:
        yield model
    finally:
        remove(model)
        for net, old, pipe in previous:
            Patch(stock_module(net), old, pipe)
