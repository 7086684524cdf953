"""UNets with the original names (input_blocks, middle_block, output_blocks): ComfyUI, Forge, AUTOMATIC1111.

`attach` takes the hooks for attention that ComfyUI and Forge offer on a clone of the model. `apply` puts hooks on the
modules themselves, for AUTOMATIC1111, and `remove` takes them off.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from agentsd.config import AgentSDConfig, Merge
from agentsd.layer import BlockState, accelerated_attention
from agentsd.ops import kernels
from agentsd.ops.attention import Attend
from agentsd.planning import LayerPlan, Planner, level_grid
from agentsd.schedule import Clock

Map = Callable[[Tensor], Tensor]

# Projected queries, keys and values, B×N×(heads·d), the number of heads and the host's extra options → B×N×(heads·d).
HostAttention = Callable[[Tensor, Tensor, Tensor, int, dict[str, Any]], Tensor]

_KEY = "agentsd"


@dataclass(frozen=True)
class SelfAttentionLayer:
    """A transformer block with self-attention; `module` is the host's name of what it lies in, ("input", 4) …."""

    module: tuple[str, int]
    level: int
    block: nn.Module


def find_layers(unet: Any) -> list[SelfAttentionLayer]:
    """Every transformer block with self-attention; level 1 is the latent grid, one more after each downsampler.

    Raises:
        ValueError: the model is no such UNet, or has no such block.
    """
    if not all(hasattr(unet, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        raise ValueError(f"model is a {type(unet).__name__}; it must be a UNet of Stable Diffusion 1, 2 or XL")
    parts = (("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks))
    layers, level = [], 1
    for name, modules in parts:
        for index, module in enumerate(modules):
            for child in module.children():
                layers += [
                    SelfAttentionLayer((name, index), level, block)
                    for block in getattr(child, "transformer_blocks", ())
                    if not getattr(block, "disable_self_attn", False)
                ]
                level += {"Downsample": 1, "Upsample": -1}.get(type(child).__name__, 0)
    if not layers:
        raise ValueError(f"{type(unet).__name__} has no self-attention layer to accelerate")
    return layers


def presets() -> tuple[str, ...]:
    """Names of the presets for these hosts: those without a step cache."""
    return tuple(name for name in AgentSDConfig.presets() if not AgentSDConfig.from_preset(name).caches)


def from_preset(name: str, ratio: float) -> AgentSDConfig:
    """A preset with another ratio, which has no effect where no queries are merged."""
    config = AgentSDConfig.from_preset(name)
    return config.replace(ratio=ratio) if config.has("ratio") else config


def _planner(config: AgentSDConfig, layers: Iterable[SelfAttentionLayer]) -> Planner:
    if config.caches:
        raise ValueError("steps is set; the step cache is for diffusers only, steps must be empty here")
    for phase in config.phases:
        if isinstance(phase.attention, Merge) and phase.attention.parts != ("attn",):
            raise ValueError(f"parts is {list(phase.attention.parts)}; there are hooks for attn only here")
    return Planner(config, (layer.level for layer in layers))


class Layer:
    """A self-attention layer as `accelerated_attention` takes it.

    Args:
        heads: their number.
        attend: the fused attention.
        projections: to the queries, the keys and the values, each tokens → B×N×(heads·d).
        to_out: B×N×(heads·d) → the layer's output.
        forward: the host's attention among tokens; None: the projections and `attend`.
    """

    def __init__(
        self, heads: int, attend: Attend, projections: Sequence[Map], to_out: Map, forward: Map | None = None
    ) -> None:
        def with_heads(project: Map, tokens: Tensor) -> Tensor:
            return project(tokens).unflatten(-1, (heads, -1)).transpose(1, 2)

        self.query, self.key, self.value = (partial(with_heads, project) for project in projections)
        self.attend, self.to_out, self.forward = attend, to_out, forward

    def out(self, heads: Tensor) -> Tensor:
        return self.to_out(heads.transpose(1, 2).flatten(2))

    def stock(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        if self.forward and bias is None:
            return self.forward(tokens)
        return self.out(self.attend(self.query(tokens), self.key(tokens), self.value(tokens), attn_mask=bias))


def attend_with(function: HostAttention, extra: dict[str, Any]) -> Attend:
    """The host's softmax attention with the signature of `scaled_dot_product_attention`.

    A bias, the log s of proportional attention, goes to PyTorch's fused attention: not every backend of a host has one.
    """

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
    ) -> Tensor:
        if attn_mask is not None:
            return kernels.choose()(query, key, value, attn_mask, scale=scale)
        heads, size = query.shape[1], query.shape[-1]
        if scale is not None:
            # The oldest of them take no scale.
            query = query * (scale * size**0.5)
        q, k, v = (tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value))
        return function(q, k, v, heads, extra).unflatten(-1, (heads, size)).transpose(1, 2)

    return attend


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
    """A clone of a model of ComfyUI or Forge with the acceleration on it; the model itself is not changed.

    A patch of the self-attention's inputs keeps the normed tokens, by which others are matched, in the block's own
    `extra_options`; a replacement of the self-attention computes the layer. Nothing is kept from one block to the next
    but the last noise level read. Layers that another node has replaced, or whose inputs it changes, are skipped.

    Args:
        model: the host's ModelPatcher.
        config: the configuration.
        sampling: of the host's model → the object with the schedule's `log_sigmas`.
        function: the host's attention.

    Raises:
        ValueError: the model has no layer that the configuration covers, or there is no hook for it.
    """
    layers = find_layers(model.model.diffusion_model)
    planner = _planner(config, layers)
    clone = model.clone()
    host, clock = clone.model, Sigmas()
    thirds = [lambda side_by_side, part=part: side_by_side.chunk(3, -1)[part] for part in range(3)]

    # Functions, not methods: Forge copies a clone's options deeply, and functions are not copied.
    def remember(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        extra[_KEY] = n if context is n and value is n else None
        return n, context, value

    def replacement(level: int) -> Callable[..., Tensor]:
        def replace(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], *_: Any, **__: Any) -> Tensor:
            heads, x = extra["n_heads"], extra.get(_KEY)
            if x is None or not q.shape[:2] == k.shape[:2] == v.shape[:2] == x.shape[:2]:
                return function(q, k, v, heads, extra)
            shape = extra.get("activations_shape")
            grid = (shape[-2], shape[-1]) if shape else level_grid(tuple(extra["original_shape"][-2:]), level)
            log_sigmas = sampling(host).log_sigmas
            timestep = clock.timestep(extra["sigmas"], log_sigmas) if planner.needs_timestep else 0.0
            plan = planner.plan(level, grid, timestep, len(log_sigmas), q.device)
            if plan is None or plan.tokens != q.shape[1]:
                return function(q, k, v, heads, extra)
            # Projections are linear: the mean of some tokens' queries is the query of their mean, so that queries, keys
            # and values side by side are merged instead of the tokens.
            layer = Layer(heads, attend_with(function, extra), thirds, to_out=lambda tokens: tokens)
            return accelerated_attention(torch.cat((q, k, v), -1), plan, BlockState({}, level, x), layer)

        setattr(replace, _KEY, True)
        return replace

    setattr(remember, _KEY, True)
    options = clone.model_options.get("transformer_options", {})
    taken = options.get("patches_replace", {}).get("attn1", {})
    for module in [module for module, other in taken.items() if hasattr(other, _KEY)]:
        del taken[module]
    levels = {layer.module: layer.level for layer in layers if layer.level in planner.covered}
    skipped = [module for module in levels if module in taken]
    if skipped:
        names = ", ".join(f"{name} {index}" for name, index in skipped)
        logging.warning("AgentSD skips the self-attention of %s: another node has replaced it", names)
    if not any(hasattr(other, _KEY) for other in options.get("patches", {}).get("attn1_patch", [])):
        clone.set_model_attn1_patch(remember)
    for (name, index), level in levels.items():
        if (name, index) not in skipped:
            clone.set_model_attn1_replace(replacement(level), name, index)
    return clone


class ModulePatch:
    """The acceleration of one UNet by hooks on its modules: its layers and what the call in progress is to do."""

    def __init__(
        self, unet: nn.Module, config: AgentSDConfig, num_train_timesteps: int, disabled: Callable[[], bool]
    ) -> None:
        layers = find_layers(unet)
        self.planner = _planner(config, layers)
        self.num_train_timesteps = num_train_timesteps
        self.disabled = disabled
        self.clock = Clock()
        self.plans: dict[int, LayerPlan] = {}
        self.undo = ExitStack()
        before_call = partial(ModulePatch.before_call, self)
        self.undo.enter_context(unet.register_forward_pre_hook(before_call, with_kwargs=True))
        for layer in layers:
            if layer.level in self.planner.covered:
                state = BlockState(self.plans, layer.level)
                for handle in state.hook(layer.block, self.planner.parts(layer.level)):
                    self.undo.enter_context(handle)
                self.wrap(layer.block.attn1, state)

    def before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the UNet: decide what each level does in this call."""
        self.plans.clear()
        if self.disabled():
            return
        sample: Tensor = args[0] if args else kwargs["x"]
        timesteps = args[1] if len(args) > 1 else kwargs["timesteps"]
        timestep = self.clock.read(timesteps) if self.planner.needs_timestep else 0.0
        size = sample.shape[-2], sample.shape[-1]
        self.plans.update(self.planner.plans(size, timestep, self.num_train_timesteps, sample.device))

    def wrap(self, module: Any, state: BlockState) -> None:
        """Put the acceleration before the forward method that a self-attention has now."""
        before = vars(module).get("forward")

        # The user's choice of attention replaces the class's method, which is looked up in each call.
        def stock(*args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = (before or partial(type(module).forward, module))(*args, **kwargs)
            return out

        projections = module.to_q, module.to_k, module.to_v
        layer = Layer(module.heads, kernels.choose(), projections, module.to_out, forward=stock)

        def forward(x: Tensor, context: Any = None, mask: Any = None, **others: Any) -> Tensor:
            plan = state.plan(x)
            # SDXL's blocks have two more arguments, which no pipeline for images sets.
            asked = others.get("additional_tokens") is not None or others.get("n_times_crossframe_attn_in_self")
            if plan is None or asked or context is not None or mask is not None:
                return stock(x, context=context, mask=mask, **others)
            return accelerated_attention(x, plan, state, layer)

        module.forward = forward
        if before is None:
            self.undo.callback(delattr, module, "forward")
        else:
            self.undo.callback(setattr, module, "forward", before)

    def remove(self) -> None:
        """Give every module its method back and take the hooks off."""
        self.plans.clear()
        self.undo.close()


def apply(
    unet: nn.Module,
    config: AgentSDConfig,
    num_train_timesteps: int = 1000,
    disabled: Callable[[], bool] = lambda: False,
) -> ModulePatch:
    """Accelerate a UNet by hooks on its modules. Applying again replaces the configuration.

    Args:
        unet: with blocks, norms and attentions named as in the original Stable Diffusion.
        config: the configuration.
        num_train_timesteps: of the noise schedule.
        disabled: asked before each call whether the UNet computes as stock in it.

    Raises:
        ValueError: the model has no layer that the configuration covers, or there is no hook for it.
    """
    remove(unet)
    return ModulePatch(unet, config, num_train_timesteps, disabled)


def remove(unet: nn.Module) -> None:
    """Take the hooks of `apply` off. Does nothing where there are none."""
    for hook in list(unet._forward_pre_hooks.values()):
        if isinstance(hook, partial) and hook.args and isinstance(patch := hook.args[0], ModulePatch):
            patch.remove()
