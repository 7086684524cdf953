"""The node AgentSD: its inputs, what it does, and the node as older versions of ComfyUI take it."""

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from agentsd.config import ATTENTIONS, AgentSDConfig, Phase
from agentsd.hosts.ldm import attach, from_preset, presets

CUSTOM, STOCK = "custom", "stock"


@dataclass(frozen=True)
class Input:
    """An input of the node: `kind` is ComfyUI's name of its type, `limits` its default, range and step or choices."""

    name: str
    kind: str
    tooltip: str
    limits: dict[str, Any] = field(default_factory=dict)


INPUTS = (
    Input(
        "enabled",
        "BOOLEAN",
        "Off: the model passes through unchanged. Switch it to compare with the same seed.",
        {"default": True},
    ),
    Input(
        "preset",
        "COMBO",
        "paper: AgentSD as published, changes the image most. faithful: stays closest to the stock image. "
        "fast: fewest agents. hires: for 1024×1024 and more. custom: takes the inputs below, which have no effect in "
        "the other presets.",
        {"options": (*presets(), CUSTOM), "default": "paper"},
    ),
    Input(
        "ratio",
        "FLOAT",
        "Share of the tokens that are merged away by agent and merge. More is faster and loses detail. "
        "No effect in faithful, fast and hires, which merge no queries.",
        {"default": 0.4, "min": 0.0, "max": 0.75, "step": 0.05},
    ),
    Input(
        "seed",
        "INT",
        "Decides which token of each cell is the destination of the others. Not the seed of the noise.",
        {"default": 0, "min": 0, "max": 0xFFFFFFFF},
    ),
    Input(
        "first_attention",
        "COMBO",
        "Custom, first part of the denoising. agent: a few agents aggregate all tokens and broadcast to all. "
        "merge: similar tokens are averaged (ToMe). kv: every token attends to weighted groups. stock: unmodified.",
        {"options": (*ATTENTIONS, STOCK), "default": "agent"},
    ),
    Input(
        "first_stride",
        "INT",
        "Custom: side of the cells, in tokens, each with one destination. "
        "4 makes 256 groups or agents of 4,096 tokens, 2 makes 1,024.",
        {"default": 4, "min": 2, "max": 16},
    ),
    Input(
        "first_until",
        "FLOAT",
        "Custom: where the first part ends, as a share of the noise schedule: 0 is pure noise, 1 the image. "
        "1 leaves no second part.",
        {"default": 0.4, "min": 0.0, "max": 1.0, "step": 0.05},
    ),
    Input(
        "second_attention",
        "COMBO",
        "Custom: as first_attention, for the second part of the denoising, where detail is made.",
        {"options": (*ATTENTIONS, STOCK), "default": "merge"},
    ),
    Input(
        "second_stride",
        "INT",
        "Custom: as first_stride, for the second part.",
        {"default": 2, "min": 2, "max": 16},
    ),
    Input(
        "levels",
        "INT",
        "Custom: how many resolutions are covered, from the finest that has self-attention. "
        "The finest costs most; the coarser ones bring little below 1024×1024 pixels.",
        {"default": 1, "min": 1, "max": 3},
    ),
    Input(
        "k_scale2",
        "FLOAT",
        "Custom, agent: how evenly the agents are broadcast to a token. Small: few of them, sharply; "
        "1: as in stock attention.",
        {"default": 0.3, "min": 0.0, "max": 2.0, "step": 0.05},
    ),
    Input(
        "k_shortcut",
        "FLOAT",
        "Custom, agent: how much of its own value is added to each token; brings back some detail.",
        {"default": 0.075, "min": 0.0, "max": 1.0, "step": 0.005},
    ),
)

MODEL_TOOLTIP = "A Stable Diffusion 1.x, 2.x or XL model."
DESCRIPTION = "Makes the self-attention of Stable Diffusion's UNet cheaper, without training (AgentSD)."
CATEGORY = "model_patches/unet"


def configuration(
    preset: str,
    ratio: float,
    seed: int,
    first_attention: str,
    first_stride: int,
    first_until: float,
    second_attention: str,
    second_stride: int,
    levels: int,
    k_scale2: float,
    k_shortcut: float,
) -> AgentSDConfig:
    """The configuration that the inputs say."""
    if preset != CUSTOM:
        return from_preset(preset, ratio).replace(seed=seed)

    def phase(until: float, attention: str, stride: int) -> Phase:
        kind = ATTENTIONS.get(attention)
        given: dict[str, Any] = {"ratio": ratio, "stride": stride, "k_scale2": k_scale2, "k_shortcut": k_shortcut}
        technique = (
            kind(**{item.name: given[item.name] for item in fields(kind) if item.name in given}) if kind else None
        )
        return Phase(until, technique, levels=tuple(range(0, -levels, -1)))

    phases = [phase(first_until, first_attention, first_stride)] if first_until > 0 else []
    if first_until < 1:
        phases.append(phase(1.0, second_attention, second_stride))
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
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[Any, dict[str, Any]]]]:  # noqa: N802
        """The inputs in the form that ComfyUI reads."""
        required: dict[str, tuple[Any, dict[str, Any]]] = {"model": ("MODEL", {"tooltip": MODEL_TOOLTIP})}
        for item in INPUTS:
            limits = {"tooltip": item.tooltip, **item.limits}
            choices = limits.pop("options", None)
            required[item.name] = (list(choices) if choices else item.kind, limits)
        return {"required": required}

    def patch(self, model: Any, **inputs: Any) -> tuple[Any]:
        return (accelerate(model, **inputs),)


NODE_CLASS_MAPPINGS = {"AgentSD": AgentSD}
NODE_DISPLAY_NAME_MAPPINGS = {"AgentSD": "AgentSD"}
