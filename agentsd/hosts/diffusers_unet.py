"""diffusers' UNets and ControlNets: finding their self-attention layers, putting hooks on, taking them off."""

import warnings
import weakref
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from agentsd.cache import Call, Kind, techniques
from agentsd.config import AgentSDConfig, AgentSDWarning
from agentsd.layer import BlockState, accelerated_attention
from agentsd.ops import kernels
from agentsd.ops.attention import Attend
from agentsd.planning import LayerPlan, Planner
from agentsd.schedule import Clock

if TYPE_CHECKING:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention


@dataclass(frozen=True)
class SelfAttentionLayer:
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


def find_layers(model: nn.Module) -> list[SelfAttentionLayer]:
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
                    layers.append(SelfAttentionLayer(f"{name}.transformer_blocks.{index}.attn1", levels[part], block))
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


class Layer:
    """A diffusers attention layer, as `accelerated_attention` takes it."""

    def __init__(self, attn: "Attention", inner: Any, attend: Attend, kwargs: dict[str, Any]) -> None:
        self.attn, self.inner, self.attend, self.kwargs = attn, inner, attend, kwargs

    def heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)

    def query(self, tokens: Tensor) -> Tensor:
        query = self.heads(self.attn.to_q(tokens))
        return query if self.attn.norm_q is None else self.attn.norm_q(query)

    def key(self, tokens: Tensor) -> Tensor:
        key = self.heads(self.attn.to_k(tokens))
        return key if self.attn.norm_k is None else self.attn.norm_k(key)

    def value(self, tokens: Tensor) -> Tensor:
        return self.heads(self.attn.to_v(tokens))

    def out(self, heads: Tensor) -> Tensor:
        attn = self.attn
        out = attn.to_out[1](attn.to_out[0](heads.transpose(1, 2).flatten(2)))
        return out / attn.rescale_output_factor if attn.rescale_output_factor != 1 else out

    def stock(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        from diffusers.models.attention_processor import AttnProcessor2_0

        if type(self.inner) is AttnProcessor2_0:
            q, k, v = self.query(tokens), self.key(tokens), self.value(tokens)
            return self.out(self.attend(q, k, v, attn_mask=bias))
        mask = None if bias is None else bias[:, 0]
        out: Tensor = self.inner(self.attn, tokens, attention_mask=mask, **self.kwargs)
        return out


class AgentSDProcessor:
    """Wraps the processor of one self-attention layer (AgentSD).

    Whatever it does not handle goes to the wrapped processor untouched: cross-attention, attention masks, a level that
    no phase covers, a token count that is not the level's grid.

    Attributes:
        inner: the processor that it wraps.
        attend: the fused attention of the layer.
        state: of the layer's block.
    """

    def __init__(self, inner: Any = None, state: BlockState | None = None) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

        # Loading an IP-Adapter makes new processors without arguments; the next call puts them to work.
        self.inner = AttnProcessor2_0() if inner is None else inner
        xformers = isinstance(self.inner, XFormersAttnProcessor)
        self.attend = kernels.xformers_attention(self.inner.attention_op) if xformers else kernels.choose()
        self.state = state or BlockState({}, 0)

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The output of the attention layer, B×N×C."""
        plan = self.state.plan(hidden_states)
        # Guiders that perturb a layer's scores put a hook on it and count on as many keys as queries.
        hooks = getattr(getattr(attn, "_diffusers_hook", None), "hooks", None)
        other = encoder_hidden_states is not None or attention_mask is not None or hooks
        if plan is None or plan.attention is None or other:
            masks = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
            out: Tensor = self.inner(attn, hidden_states, **masks, **kwargs)
            return out
        return accelerated_attention(hidden_states, plan, self.state, Layer(attn, self.inner, self.attend, kwargs))


@cache
def _register_processor() -> None:
    """Let diffusers' hooks that skip layers know what a skipped layer returns; they look processors up by class."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry
    from diffusers.models.attention_processor import AttnProcessor2_0

    AttentionProcessorRegistry.register(AgentSDProcessor, AttentionProcessorRegistry.get(AttnProcessor2_0))


def obstacle(attn: "Attention", inner: Any) -> str | None:
    """Why a layer has to be skipped, or None."""
    from diffusers.models import attention_processor as stock

    known = (
        stock.AttnProcessor2_0,
        stock.AttnProcessor,
        stock.FusedAttnProcessor2_0,
        stock.SlicedAttnProcessor,
        stock.XFormersAttnProcessor,
    )
    if type(inner) not in known:
        return type(inner).__name__
    names = ("group_norm", "spatial_norm", "norm_cross", "residual_connection")
    return next((name for name in names if getattr(attn, name, None)), None)


class Patch:
    """The acceleration of one UNet or ControlNet: its layers, its hooks and what the call in progress is to do.

    Attributes:
        skipped: covered layers that are not accelerated, and why.
        sample: height and width of the last call's sample.
        techniques: what works across calls (`agentsd.cache`).
    """

    def __init__(self, model: nn.Module, config: AgentSDConfig, pipe: Any = None) -> None:
        self.model = model
        self.config = config
        # Its scheduler may be swapped. Not owned: a copy of the model is not to copy the pipeline.
        self.pipe = weakref.ref(pipe) if hasattr(pipe, "scheduler") else lambda: None
        self.enabled = True
        self.clock = Clock()
        self.plans: dict[int, LayerPlan] = {}
        self.states: dict[str, BlockState] = {}
        self.skipped: dict[str, str] = {}
        self.sample: tuple[int, int] | None = None
        self.layers = find_layers(model)
        if not self.layers:
            others = other_self_attention(model)
            why = f"; that of {', '.join(others)} is not covered" if others else ""
            raise ValueError(f"{type(model).__name__} has no spatial self-attention layer to accelerate{why}")
        self.planner = Planner(config, (layer.level for layer in self.layers), type(model).__name__)
        self.covered = [layer for layer in self.layers if layer.level in self.planner.covered]
        self.handles: list[RemovableHandle] = []
        _register_processor()
        self.techniques = techniques(model, config)
        self.wrap_all()
        # Plain Python beside a compiled model. Unlike the function that torch.compiler.disable makes of a method, a
        # partial is copied with the model.
        before_call = partial(torch.compiler.disable(Patch.before_call), self)
        self.handles.append(model.register_forward_pre_hook(before_call, with_kwargs=True))
        for technique in self.techniques:
            technique.attach()
            after_call = partial(torch.compiler.disable(type(technique).after_call), technique)
            self.handles.append(model.register_forward_hook(after_call))

    def technique(self, kind: type[Kind]) -> Kind | None:
        """The technique of a class, if the configuration has it."""
        return next((technique for technique in self.techniques if isinstance(technique, kind)), None)

    def wrap(self, layer: SelfAttentionLayer) -> str | None:
        """Put the acceleration around the processor that the layer has now; or say why the layer is skipped."""
        attn = layer.block.attn1
        inner = attn.processor
        if isinstance(inner, AgentSDProcessor) and inner.state is self.states.get(layer.name):
            return None
        inner = inner.inner if isinstance(inner, AgentSDProcessor) else inner
        reason = obstacle(attn, inner)
        if reason is None:
            if layer.name not in self.states:
                state = self.states[layer.name] = BlockState(self.plans, layer.level)
                self.handles += state.hook(layer.block, self.planner.parts(layer.level))
            attn.set_processor(AgentSDProcessor(inner, self.states[layer.name]))
        return reason

    def wrap_all(self) -> None:
        """Wrap every covered layer whose processor is not ours: IP-Adapters, xformers and slicing bring their own.

        Warns of layers that are skipped, once for each reason.
        """
        from diffusers.models.attention import BasicTransformerBlock

        kind = type(self.model).__name__
        for layer in self.covered:
            if type(layer.block).forward is not BasicTransformerBlock.forward:
                raise ValueError(
                    f"{kind} has transformer blocks of class {type(layer.block).__name__}: something else, such as "
                    "tomesd, merges their tokens; take it off, or call agentsd.remove(model)"
                )
        skipped = {layer.name: reason for layer in self.covered if (reason := self.wrap(layer))}
        names = ", ".join(sorted(set(skipped.values())))
        if self.covered and not self.states:
            raise ValueError(f"{kind} has no self-attention layer that can be accelerated: {names} is not supported")
        if skipped and skipped != self.skipped:
            warnings.warn(
                f"agentsd skips {len(skipped)} of {len(self.covered)} covered layers of {kind} because of {names}; "
                "agentsd.describe(model) lists them",
                AgentSDWarning,
                stacklevel=2,
            )
        self.skipped = skipped

    def before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: decide what each level does in this call."""
        self.plans.clear()
        if not self.enabled:
            for technique in self.techniques:
                technique.reset()
            return
        self.wrap_all()
        sample: Tensor = args[0] if args else kwargs["sample"]
        timestep = self.clock.read(args[1] if len(args) > 1 else kwargs["timestep"])
        scheduler = getattr(self.pipe(), "scheduler", None)
        steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)
        self.sample = (sample.shape[-2], sample.shape[-1])
        self.plans.update(self.planner.plans(self.sample, timestep, steps, sample.device))
        text = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
        call = Call(timestep, steps, self.clock, sample, text)
        for technique in self.techniques:
            technique.before_call(call)

    def remove(self) -> None:
        """Give every layer its processor back and take the hooks off."""
        self.plans.clear()
        for technique in self.techniques:
            technique.detach()
        for handle in self.handles:
            handle.remove()
        for layer in self.covered:
            if isinstance(processor := layer.block.attn1.processor, AgentSDProcessor):
                layer.block.attn1.set_processor(processor.inner)
        # Where fuse_qkv_projections keeps the processors that unfuse_qkv_projections puts back.
        kept = getattr(self.model, "original_attn_processors", None) or {}
        kept.update({name: p.inner for name, p in kept.items() if isinstance(p, AgentSDProcessor)})


def networks(model: Any) -> list[nn.Module]:
    """The UNet and the ControlNets of a pipeline, or the network itself, without what torch.compile wraps around."""
    if isinstance(model, nn.Module):
        nets = getattr(model, "nets", None)
        return list(nets) if isinstance(nets, nn.ModuleList) else [getattr(model, "_orig_mod", model)]
    found = [net for name in ("unet", "controlnet") if isinstance(net := getattr(model, name, None), nn.Module)]
    if not found:
        raise ValueError(
            f"model is a {type(model).__name__}; it must be a diffusers pipeline with a UNet, a UNet or a ControlNet"
        )
    return [net for part in found for net in networks(part)]


def patch_of(net: nn.Module) -> Patch | None:
    """The patch on a network, found by its hook."""
    for hook in getattr(net, "_orig_mod", net)._forward_pre_hooks.values():
        if isinstance(hook, partial) and hook.args and isinstance(patch := hook.args[0], Patch):
            return patch
    return None
