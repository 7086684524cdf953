"""UNets with the original names (input_blocks, middle_block, output_blocks): ComfyUI, Forge, AUTOMATIC1111.

Two ways in. `attach` takes the hooks for attention that ComfyUI and Forge offer on a clone of the model. `apply` puts
forward hooks on the modules themselves, for AUTOMATIC1111, and `remove` takes them off.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from agentsd.attention import Attend, attention
from agentsd.config import AgentSDConfig, Phase
from agentsd.merging import destinations, step_key
from agentsd.patch import level_grid
from agentsd.processor import AgentSDProcessor, Block, Plan
from agentsd.schedule import Clock, phase_at, progress

# Projected queries, keys and values, B×N×(heads·d), the number of heads and the host's extra options → B×N×(heads·d).
HostAttention = Callable[[Tensor, Tensor, Tensor, int, dict[str, Any]], Tensor]

_KEY = "agentsd"


@dataclass(frozen=True)
class Layer:
    """A transformer block: the place of its module in the UNet, `("input", 4)` and the like, and its level."""

    place: tuple[str, int]
    level: int
    block: nn.Module


def find_layers(unet: Any) -> list[Layer]:
    """Every transformer block with self-attention; level 1 is the latent grid, one more after each downsampler.

    Raises:
        ValueError: the model is no such UNet.
    """
    if not all(hasattr(unet, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        raise ValueError(f"model is a {type(unet).__name__}; it must be a UNet of Stable Diffusion 1, 2 or XL")
    parts = (("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks))
    layers, level = [], 1
    for name, modules in parts:
        for index, module in enumerate(modules):
            for child in module.children():
                layers += [
                    Layer((name, index), level, block)
                    for block in getattr(child, "transformer_blocks", ())
                    if not getattr(block, "disable_self_attn", False)
                ]
                level += {"Downsample": 1, "Upsample": -1}.get(type(child).__name__, 0)
    if not layers:
        raise ValueError(f"{type(unet).__name__} has no self-attention layer to accelerate")
    return layers


def presets() -> tuple[str, ...]:
    """Names of the presets that these hosts have hooks for: those that keep nothing from one call to the next."""
    return tuple(name for name in AgentSDConfig.presets() if not AgentSDConfig.from_preset(name).reuses)


class Planner:
    """What each level of a model does at each timestep.

    Args:
        config: the configuration.
        levels: at which the model has self-attention.

    Raises:
        ValueError: the configuration asks for what these hosts have no hook for, or covers none of the levels.
    """

    def __init__(self, config: AgentSDConfig, levels: Iterable[int]) -> None:
        if config.reuses or config.refine:
            field = "refine" if config.refine else "reuse_interval, match_interval or cross_reuse_from"
            raise ValueError(f"{field} is set; it is for diffusers only and must be left out here")
        present = sorted(set(levels))
        self.config = config
        self.parts: dict[Phase, dict[int, Phase]] = {}
        for phase in config.phases:
            asked = (0,) if phase.levels is None else phase.levels
            self.parts[phase] = {level if level > 0 else present[0] - level: phase.on(level) for level in asked}
        parts = [(level, part) for of_phase in self.parts.values() for level, part in of_phase.items()]
        for name in ("merge_crossattn", "merge_mlp"):
            if any(getattr(part, name) for _, part in parts):
                raise ValueError(f"{name} is true; there is no hook for it here, it must be false")
        self.covered = {level for level, part in parts if part.acts and level in present}
        if not self.covered and any(part.acts for _, part in parts):
            wanted = sorted({level for level, _ in parts})
            raise ValueError(f"levels is {wanted}; the model has self-attention at levels {present}")
        # A function of its arguments alone: the layers of a step, conditional or not, ask for the same few.
        self._destinations = lru_cache(maxsize=16)(destinations)

    @property
    def needs_timestep(self) -> bool:
        """Whether two timesteps can differ in what is done."""
        return self.config.use_rand or len(self.parts) > 1

    def plan(
        self, level: int, grid: tuple[int, int], timestep: float, steps: int, device: torch.device | str
    ) -> Plan | None:
        """What the layers of a level do at `timestep` of `steps`; None leaves them alone."""
        part = self.parts[phase_at(self.config.phases, progress(timestep, steps))].get(level)
        if part is None or not part.acts or not part.pays_on(grid):
            return None
        key = step_key(self.config.seed, timestep) if self.config.use_rand else None
        places = self._destinations(grid, part.cell_on(grid), key, device)
        return Plan(part, self.config.ratio_of(part), grid, places)


class Projected:
    """A layer whose tokens are its queries, keys and values side by side.

    Projections are linear: the mean of some tokens' queries is the query of their mean. So merging after the
    projections, here, is merging before them, as the processor does for diffusers.
    """

    norm_q = norm_k = None
    rescale_output_factor = 1
    to_out = (nn.Identity(), nn.Identity())

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def to_q(self, tokens: Tensor) -> Tensor:
        return tokens.chunk(3, -1)[0]

    def to_k(self, tokens: Tensor) -> Tensor:
        return tokens.chunk(3, -1)[1]

    def to_v(self, tokens: Tensor) -> Tensor:
        return tokens.chunk(3, -1)[2]


def attend_with(function: HostAttention, extra: dict[str, Any]) -> Attend:
    """The host's softmax attention with the signature of `scaled_dot_product_attention`.

    A bias, the log s of proportional attention, goes to torch's fused attention: not every backend of a host takes one.
    """

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
    ) -> Tensor:
        if attn_mask is not None:
            return attention(query, key, value, attn_mask, scale=scale)
        heads, size = query.shape[1], query.shape[-1]
        if scale is not None:
            # The oldest of them have no scale of their own.
            query = query * (scale * size**0.5)
        q, k, v = (tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value))
        return function(q, k, v, heads, extra).unflatten(-1, (heads, size)).transpose(1, 2)

    return attend


class Stock:
    """The attention that is replaced, in the place of diffusers' processor."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(self, attn: Projected, tokens: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in tokens.chunk(3, -1))
        mask = None if attention_mask is None else attention_mask[:, None]
        return self.attend(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Sigmas(threading.local):
    """Reads the noise level from the device once per call of the denoiser, in each thread by itself."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._timestep = 0.0

    def timestep(self, sigmas: Tensor, log_sigmas: Tensor) -> float:
        """The timestep whose noise level is nearest, among all of the schedule."""
        if self._last is not sigmas:
            distance = sigmas.flatten()[:1].to(log_sigmas).log() - log_sigmas
            self._timestep, self._last = float(distance.abs().argmin()), sigmas
        return self._timestep


def attach(model: Any, config: AgentSDConfig, sampling: Callable[[Any], Any], function: HostAttention) -> Any:
    """A clone of a model of ComfyUI or Forge with the acceleration on it; the model itself is left as it is.

    A patch of the self-attention's inputs keeps the normed tokens, by which others are matched, in the block's own
    `extra_options`; a replacement of the self-attention does the rest. Nothing is kept between two blocks but the last
    noise level read. An attention that another node has replaced, or whose inputs another node changes, is left to it.

    Args:
        model: the host's ModelPatcher.
        config: the configuration.
        sampling: of the host's model → the object with the schedule's `log_sigmas`.
        function: the host's attention.

    Raises:
        ValueError: the model has no layer that the configuration covers, or there is no hook for it.
    """
    layers = find_layers(model.model.diffusion_model)
    planner = Planner(config, (layer.level for layer in layers))
    clone = model.clone()
    host, clock = clone.model, Sigmas()

    # Functions, not methods: Forge copies a clone's options deeply, and functions are not copied.
    def remember(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        extra[_KEY] = n if context is n and value is n else None
        return n, context, value

    def replacement(level: int) -> Callable[..., Tensor]:
        def replace(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], *_: Any, **__: Any) -> Tensor:
            heads = extra["n_heads"]
            x = extra.get(_KEY)
            if x is None or not q.shape[:2] == k.shape[:2] == v.shape[:2] == x.shape[:2]:
                return function(q, k, v, heads, extra)
            shape = extra.get("activations_shape")
            grid = (shape[-2], shape[-1]) if shape else level_grid(tuple(extra["original_shape"][-2:]), level)
            log_sigmas = sampling(host).log_sigmas
            timestep = clock.timestep(extra["sigmas"], log_sigmas) if planner.needs_timestep else 0.0
            plan = planner.plan(level, grid, timestep, len(log_sigmas), q.device)
            if plan is None or plan.tokens != q.shape[1]:
                return function(q, k, v, heads, extra)
            block = Block({level: plan}, level, ())
            block.x = x
            processor = AgentSDProcessor(Stock(attend_with(function, extra)), block)
            processor.attend = processor.inner.attend
            return processor(Projected(heads), torch.cat((q, k, v), -1))

        setattr(replace, _KEY, True)
        return replace

    setattr(remember, _KEY, True)
    options = clone.model_options.get("transformer_options", {})
    taken = options.get("patches_replace", {}).get("attn1", {})
    for place in [place for place, other in taken.items() if hasattr(other, _KEY)]:
        del taken[place]
    places = {layer.place: layer.level for layer in layers if layer.level in planner.covered}
    left = [place for place in places if place in taken]
    if left:
        names = ", ".join(f"{name} {index}" for name, index in left)
        logging.warning("AgentSD leaves the self-attention of %s alone: another node has replaced it", names)
    if not any(hasattr(other, _KEY) for other in options.get("patches", {}).get("attn1_patch", [])):
        clone.set_model_attn1_patch(remember)
    for (name, index), level in places.items():
        if (name, index) not in left:
            clone.set_model_attn1_replace(replacement(level), name, index)
    return clone


class ProcessorModule:
    """A self-attention module with the original names, as the processor for diffusers takes it."""

    norm_q = norm_k = None
    rescale_output_factor = 1

    def __init__(self, module: Any) -> None:
        self.heads: int = module.heads
        self.to_q, self.to_k, self.to_v, self.to_out = module.to_q, module.to_k, module.to_v, module.to_out


class ModulePatch:
    """The acceleration of one UNet by hooks on its modules: its layers and what the call in progress is to do."""

    def __init__(self, unet: nn.Module, config: AgentSDConfig, steps: int, stands_back: Callable[[], bool]) -> None:
        layers = find_layers(unet)
        self.planner = Planner(config, (layer.level for layer in layers))
        self.steps = steps
        self.stands_back = stands_back
        self.clock = Clock()
        self.plans: dict[int, Plan] = {}
        self.wrapped: list[tuple[Any, Any]] = []
        self.handles: list[RemovableHandle] = [
            unet.register_forward_pre_hook(partial(ModulePatch.before_call, self), with_kwargs=True)
        ]
        for layer in layers:
            if layer.level in self.planner.covered:
                block = Block(self.plans, layer.level, ())
                self.handles += block.hook(layer.block)
                self.wrap(layer.block.attn1, block)

    def before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the UNet: decide what each level does in this call."""
        self.plans.clear()
        if self.stands_back():
            return
        sample: Tensor = args[0] if args else kwargs["x"]
        timesteps = args[1] if len(args) > 1 else kwargs["timesteps"]
        timestep = self.clock.read(timesteps) if self.planner.needs_timestep else 0.0
        for level in self.planner.covered:
            grid = level_grid((sample.shape[-2], sample.shape[-1]), level)
            if plan := self.planner.plan(level, grid, timestep, self.steps, sample.device):
                self.plans[level] = plan

    def wrap(self, module: Any, block: Block) -> None:
        """Put a processor before the forward method that the module has now."""
        before = vars(module).get("forward")
        attn = ProcessorModule(module)

        # The user's choice of attention takes the place of the class's method; it is looked up in each call.
        def stock(*args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = (before or partial(type(module).forward, module))(*args, **kwargs)
            return out

        def inner(_: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            if attention_mask is None:
                return stock(tokens)
            parts = (project(tokens) for project in (attn.to_q, attn.to_k, attn.to_v))
            q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
            out: Tensor = module.to_out(attention(q, k, v, attention_mask[:, None]).transpose(1, 2).flatten(2))
            return out

        processor = AgentSDProcessor(inner, block)

        def forward(x: Tensor, context: Any = None, mask: Any = None, **rest: Any) -> Tensor:
            # SDXL's blocks have two more arguments, which no pipeline for images sets.
            asked = rest.get("additional_tokens") is not None or rest.get("n_times_crossframe_attn_in_self")
            if asked or context is not None or mask is not None or block.plan(x) is None:
                return stock(x, context=context, mask=mask, **rest)
            return processor(attn, x)

        module.forward = forward
        self.wrapped.append((module, before))

    def remove(self) -> None:
        """Give every module its method back and take the hooks off."""
        self.plans.clear()
        for handle in self.handles:
            handle.remove()
        for module, before in self.wrapped:
            del module.forward
            if before is not None:
                module.forward = before


def apply(
    unet: nn.Module, config: AgentSDConfig, steps: int = 1000, stands_back: Callable[[], bool] = lambda: False
) -> ModulePatch:
    """Accelerate a UNet by hooks on its modules. Applying again replaces the configuration.

    Args:
        unet: with blocks, norms and attentions named as in the original Stable Diffusion.
        config: the configuration.
        steps: number of training timesteps.
        stands_back: asked before each call whether the UNet is to compute as stock in it.

    Raises:
        ValueError: the model has no layer that the configuration covers, or there is no hook for it.
    """
    remove(unet)
    return ModulePatch(unet, config, steps, stands_back)


def remove(unet: nn.Module) -> None:
    """Take the hooks of `apply` off. Does nothing where there are none."""
    for hook in list(unet._forward_pre_hooks.values()):
        if isinstance(hook, partial) and hook.args and isinstance(patch := hook.args[0], ModulePatch):
            patch.remove()
