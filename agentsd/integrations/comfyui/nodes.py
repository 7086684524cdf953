"""What the node AgentSD asks and does, and the node as older versions of ComfyUI take it."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from agentsd.config import ATTENTIONS, AgentSDConfig, Phase
from agentsd.integrations.ldm import attach, presets

CUSTOM = "custom"


@dataclass(frozen=True)
class Knob:
    """An input of the node: `kind` is ComfyUI's name of its type, `limits` its default, range and step or choices."""

    name: str
    kind: str
    tooltip: str
    limits: dict[str, Any] = field(default_factory=dict)


KNOBS = (
    Knob(
        "enabled",
        "BOOLEAN",
        "Off: the model passes through unchanged. Switch it to compare with the same seed.",
        {"default": True},
    ),
    Knob(
        "preset",
        "COMBO",
        "paper: AgentSD as published, changes the image most. faithful: stays closest to the image without it. "
        "fast: fewest agents. hires: for 1024×1024 and more. custom: what the knobs below say; they play no part "
        "in the other presets.",
        {"options": (*presets(), CUSTOM), "default": "paper"},
    ),
    Knob(
        "ratio",
        "FLOAT",
        "Share of the tokens that are merged away, where tokens are merged (paper; agent and merge in custom). "
        "More is faster and loses detail. faithful and fast merge no queries, and do not look at it.",
        {"default": 0.4, "min": 0.0, "max": 0.75, "step": 0.05},
    ),
    Knob(
        "seed",
        "INT",
        "Decides which token of each cell stands for the others. Not the seed of the noise.",
        {"default": 0, "min": 0, "max": 0xFFFFFFFF},
    ),
    Knob(
        "first_attention",
        "COMBO",
        "Custom, first part of the denoising. agent: a few agents gather from all tokens and hand on to all. "
        "merge: similar tokens are averaged (ToMe). kv: every token attends to weighted groups. stock: unchanged.",
        {"options": ATTENTIONS, "default": "agent"},
    ),
    Knob(
        "first_stride",
        "INT",
        "Custom: side of the cells, in tokens; one token of each cell stands for others. "
        "4 makes 256 groups or agents of 4,096 tokens, 2 makes 1,024.",
        {"default": 4, "min": 2, "max": 16},
    ),
    Knob(
        "first_until",
        "FLOAT",
        "Custom: where the first part ends, as a share of the noise schedule: 0 is pure noise, 1 the image. "
        "1 leaves no second part.",
        {"default": 0.4, "min": 0.0, "max": 1.0, "step": 0.05},
    ),
    Knob(
        "second_attention",
        "COMBO",
        "Custom: as first_attention, for the rest of the denoising, where detail is made.",
        {"options": ATTENTIONS, "default": "merge"},
    ),
    Knob("second_stride", "INT", "Custom: as first_stride, for the rest.", {"default": 2, "min": 2, "max": 16}),
    Knob(
        "levels",
        "INT",
        "Custom: how many resolutions are covered, from the finest that has self-attention. "
        "The finest costs most; the coarser ones bring little below 1024×1024 pixels.",
        {"default": 1, "min": 1, "max": 3},
    ),
    Knob(
        "k_scale2",
        "FLOAT",
        "Custom, agent: how evenly a token listens to the agents. Small: to few, sharply; 1: as in usual attention.",
        {"default": 0.3, "min": 0.0, "max": 2.0, "step": 0.05},
    ),
    Knob(
        "k_shortcut",
        "FLOAT",
        "Custom, agent: how much of its own value each token keeps on top; brings back some detail.",
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
    first_attention: Any,
    first_stride: int,
    first_until: float,
    second_attention: Any,
    second_stride: int,
    levels: int,
    k_scale2: float,
    k_shortcut: float,
) -> AgentSDConfig:
    """The configuration that the knobs say."""
    if preset != CUSTOM:
        return AgentSDConfig.from_preset(preset).replace(ratio=ratio, seed=seed)
    common: dict[str, Any] = {"levels": tuple(range(0, -levels, -1)), "k_scale2": k_scale2, "k_shortcut": k_shortcut}
    phases = [Phase(until=1.0, attention=second_attention, stride=second_stride, **common)]
    if first_until == 1:
        phases.clear()
    if first_until > 0:
        phases.insert(0, Phase(until=first_until, attention=first_attention, stride=first_stride, **common))
    return AgentSDConfig(ratio=ratio, seed=seed, phases=tuple(phases))


def host_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, extra: dict[str, Any]) -> Tensor:
    """The attention that ComfyUI was started with, or that another node has chosen for the model."""
    from comfy.ldm.modules import attention

    options = {name: extra[name] for name in ("attn_precision",) if name in extra}
    if "optimized_attention_override" in extra:
        options["transformer_options"] = extra
    out: Tensor = attention.optimized_attention(q, k, v, heads, **options)
    return out


def accelerate(model: Any, enabled: bool, **knobs: Any) -> Any:
    """The model with the acceleration on it, or the model itself."""
    if not enabled:
        return model
    return attach(model, configuration(**knobs), lambda host: host.model_sampling, host_attention)


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
        for knob in KNOBS:
            limits = {"tooltip": knob.tooltip, **knob.limits}
            choices = limits.pop("options", None)
            required[knob.name] = (list(choices) if choices else knob.kind, limits)
        return {"required": required}

    def patch(self, model: Any, **knobs: Any) -> tuple[Any]:
        """What the node does."""
        return (accelerate(model, **knobs),)


NODE_CLASS_MAPPINGS = {"AgentSD": AgentSD}
NODE_DISPLAY_NAME_MAPPINGS = {"AgentSD": "AgentSD"}
