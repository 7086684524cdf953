"""The node AgentSD: its inputs, what it does, and the node as older versions of ComfyUI take it."""

from dataclasses import fields
from typing import Any

from torch import Tensor

from agentsd.config import ATTENTIONS, AgentSDConfig, Phase
from agentsd.hosts.ldm import attach, from_preset, presets

CUSTOM, STOCK = "custom", "stock"


TECHNIQUES = [*ATTENTIONS, STOCK]
LIMITS: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": ("MODEL", {}),
    "enabled": ("BOOLEAN", {"default": True}),
    "preset": ([*presets(), CUSTOM], {"default": "paper"}),
    "ratio": ("FLOAT", {"default": 0.4, "min": 0.0, "max": 0.75, "step": 0.05}),
    "seed": ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFF}),
    "first_attention": (TECHNIQUES, {"default": "agent"}),
    "first_stride": ("INT", {"default": 4, "min": 2, "max": 16}),
    "first_until": ("FLOAT", {"default": 0.4, "min": 0.0, "max": 1.0, "step": 0.05}),
    "second_attention": (TECHNIQUES, {"default": "merge"}),
    "second_stride": ("INT", {"default": 2, "min": 2, "max": 16}),
    "levels": ("INT", {"default": 1, "min": 1, "max": 3}),
    "k_scale2": ("FLOAT", {"default": 0.3, "min": 0.0, "max": 2.0, "step": 0.05}),
    "k_shortcut": ("FLOAT", {"default": 0.075, "min": 0.0, "max": 1.0, "step": 0.005}),
}
TOOLTIPS = {
    "model": "A Stable Diffusion 1.x, 2.x or XL model.",
    "enabled": "Off: the model passes through unchanged. Switch it to compare with the same seed.",
    "preset": "paper: AgentSD as published, changes the image most. faithful: stays closest to the stock image. fast: "
    "fewest agents. hires: for 1024×1024 and more. custom: takes the inputs below, which have no effect in the other "
    "presets.",
    "ratio": "Share of the tokens that are merged away by agent and merge. More is faster and loses detail. No effect "
    "in faithful, fast and hires, which merge no queries.",
    "seed": "Decides which token of each cell is the destination of the others. Not the seed of the noise.",
    "first_attention": "Custom, first part of the denoising. agent: a few agents aggregate all tokens and broadcast to "
    "all. merge: similar tokens are averaged (ToMe). kv: every token attends to weighted groups. stock: unmodified.",
    "first_stride": "Custom: side of the cells, in tokens, each with one destination. 4 makes 256 groups or agents of "
    "4,096 tokens, 2 makes 1,024.",
    "first_until": "Custom: where the first part ends, as a share of the noise schedule: 0 is pure noise, 1 the image. "
    "1 leaves no second part.",
    "second_attention": "Custom: as first_attention, for the second part of the denoising, where detail is made.",
    "second_stride": "Custom: as first_stride, for the second part.",
    "levels": "Custom: how many resolutions are covered, from the finest that has self-attention. The finest costs "
    "most; the coarser ones bring little below 1024×1024 pixels.",
    "k_scale2": "Custom, agent: how evenly the agents are broadcast to a token. Small: few of them, sharply; 1: as in "
    "stock attention.",
    "k_shortcut": "Custom, agent: how much of its own value is added to each token; brings back some detail.",
}
# Name → its type or its choices, and the rest by name: as older versions of ComfyUI take the inputs.
INPUTS = {name: (kind, {**limits, "tooltip": TOOLTIPS[name]}) for name, (kind, limits) in LIMITS.items()}

DESCRIPTION = "Makes the self-attention of Stable Diffusion's UNet cheaper, without training (AgentSD)."
CATEGORY = "model_patches/unet"


def configuration(preset: str, ratio: float, seed: int, **custom: Any) -> AgentSDConfig:
    """The configuration that the inputs say."""
    if preset != CUSTOM:
        return from_preset(preset, ratio).replace(seed=seed)
    phases: list[Phase] = []
    for part, until in (("first", custom["first_until"]), ("second", 1.0)):
        if until > (phases[-1].until if phases else 0):
            given = {"ratio": ratio, "stride": custom[f"{part}_stride"], **custom}
            kind = ATTENTIONS.get(custom[f"{part}_attention"])
            technique = kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given}) if kind else None
            phases.append(Phase(until, technique, levels=tuple(range(0, -custom["levels"], -1))))
    return AgentSDConfig(tuple(phases), seed=seed)


def host_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, extra: dict[str, Any]) -> Tensor:
    """The attention that ComfyUI was started with, or that another node has chosen for the model."""
    from comfy.ldm.modules import attention

    options = {name: extra[name] for name in ("attn_precision",) if name in extra}
    if "optimized_attention_override" in extra:
        options["transformer_options"] = extra
    out: Tensor = attention.optimized_attention(q, k, v, heads, **options)
    return out


def accelerate(model: Any, enabled: bool, **inputs: Any) -> Any:
    """The model with the acceleration on it, or the model itself."""
    if not enabled:
        return model
    return attach(model, configuration(**inputs), lambda host: host.model_sampling, host_attention)


class AgentSD:
    """The node for versions without a schema."""

    DESCRIPTION = DESCRIPTION
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": INPUTS}

    def patch(self, model: Any, **inputs: Any) -> tuple[Any]:
        return (accelerate(model, **inputs),)


NODE_CLASS_MAPPINGS = {"AgentSD": AgentSD}
NODE_DISPLAY_NAME_MAPPINGS = {"AgentSD": "AgentSD"}
