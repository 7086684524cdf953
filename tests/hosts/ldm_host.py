"""A thin host in the manner of ComfyUI, Forge and AUTOMATIC1111: a tiny UNet by its original names, and a patcher.

What calls what, and with what, is that of ComfyUI's `BasicTransformerBlock` and `ModelPatcher`.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from agentsd import KV, Agent, AgentSDConfig, Merge, Phase
from agentsd.hosts import ldm
from agentsd.hosts.diffusers_unet import AgentSDProcessor
from agentsd.layer import BlockState
from agentsd.planning import Planner

HEADS, CHANNELS = 2, 16
GROUPS = AgentSDConfig((Phase(attention=KV(stride=2)),))
STOCK = AgentSDConfig((Phase(attention=None),))
VARIANTS = {
    "paper": AgentSDConfig(),
    "kv": GROUPS,
    "kv, half merged, two levels": AgentSDConfig((Phase(attention=KV(stride=(4, 2), kv_ratio=0.5), levels=(0, -1)),)),
    "agents, top left": AgentSDConfig((Phase(attention=Agent(ratio=0.3)),), seed=None),
    "merge, proportional": AgentSDConfig((Phase(attention=Merge(ratio=0.7, proportional=True)),)),
    "stock, then agents at a coarser level": AgentSDConfig(
        (Phase(until=0.5, attention=None, levels=(-1,)), Phase(attention=Agent(stride=(3, 2)), levels=(-1,)))
    ),
}


def host_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **_: Any) -> Tensor:
    """Attention of flat projections, as these hosts have it."""
    q, k, v = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    def __init__(self, channels: int, context: int | None = None) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context or channels, channels, bias=False)
        self.to_v = nn.Linear(context or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **_: Any) -> Tensor:
        context = x if context is None else context
        return self.to_out(host_attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads, mask))


class BasicTransformerBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.disable_self_attn = False
        self.attn1, self.attn2 = CrossAttention(channels), CrossAttention(channels, 8)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.ff = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any] | None) -> Tensor:
        x = x + (self.attn1(self.norm1(x)) if options is None else self.patched(self.norm1(x), options))
        x = x + self.attn2(self.norm2(x), context=context)
        return x + self.ff(self.norm3(x))

    def patched(self, n: Tensor, options: dict[str, Any]) -> Tensor:
        extra = {key: value for key, value in options.items() if key not in ("patches", "patches_replace")}
        extra |= {"n_heads": HEADS, "dim_head": n.shape[-1] // HEADS}
        context = value = n
        for patch in options.get("patches", {}).get("attn1_patch", []):
            n, context, value = patch(n, context, value, extra)
        replacements = options.get("patches_replace", {}).get("attn1", {})
        attn, position = self.attn1, options["block"]
        replace = replacements.get((*position, options["block_index"]), replacements.get(position))
        if replace is None:
            out = host_attention(attn.to_q(n), attn.to_k(context), attn.to_v(value), HEADS)
        else:
            out = replace(attn.to_q(n), attn.to_k(context), attn.to_v(value), extra)
        return attn.to_out(out)


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(channels) for _ in range(depth))

    def forward(self, h: Tensor, context: Tensor, options: dict[str, Any] | None) -> Tensor:
        if options is not None and "activations_shape" in options:
            options["activations_shape"] = list(h.shape)
        x = h.flatten(2).transpose(1, 2)
        for index, block in enumerate(self.transformer_blocks):
            if options is not None:
                options["block_index"] = index
            x = block(x, context, options)
        return h + x.transpose(1, 2).unflatten(2, h.shape[2:])


class Downsample(nn.Conv2d):
    pass


class Upsample(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2))


class UNetModel(nn.Module):
    """Self-attention at the first two levels, or at the second and third as in SDXL; two blocks deep at the coarser."""

    def __init__(self, xl: bool = False) -> None:
        super().__init__()

        def conv(kind: type[nn.Conv2d] = nn.Conv2d, **options: Any) -> nn.Module:
            return kind(CHANNELS, CHANNELS, 3, padding=1, **options)

        def attention(depth: int = 1) -> nn.Sequential:
            return nn.Sequential(conv(), SpatialTransformer(CHANNELS, depth))

        down = [nn.Sequential(conv(Downsample, stride=2))]
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, CHANNELS, 3, padding=1)), *(down if xl else [])])
        self.input_blocks.extend([attention(), *copy.deepcopy(down), attention(2)])
        self.middle_block = attention()
        self.output_blocks = nn.ModuleList([attention().append(conv(Upsample)), attention()])
        if xl:
            self.output_blocks[1].append(conv(Upsample))
        self.out = nn.Conv2d(CHANNELS, 4, 3, padding=1)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: dict[str, Any] | None = None
    ) -> Tensor:
        options, h = transformer_options, x
        if options is not None:
            options["original_shape"] = list(x.shape)
        for name, modules in (
            ("input", self.input_blocks),
            ("middle", [self.middle_block]),
            ("output", self.output_blocks),
        ):
            for index, module in enumerate(modules):
                if options is not None:
                    options["block"] = (name, index)
                for child in module:
                    h = child(h, context, options) if isinstance(child, SpatialTransformer) else child(h)
        return self.out(h)


class Sampling(nn.Module):
    """The discrete noise schedule of Stable Diffusion."""

    def __init__(self, steps: int = 1000) -> None:
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0)
        self.register_buffer("sigmas", ((1 - alphas) / alphas).sqrt())
        self.register_buffer("log_sigmas", self.sigmas.log())

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma.log() - self.log_sigmas[:, None]).abs().argmin(0).view(sigma.shape)


class Model(nn.Module):
    """What ComfyUI's BaseModel is to its sampler; Forge calls `model_sampling` `predictor`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = unet
        self.model_sampling = self.predictor = Sampling()


class ModelPatcher:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> "ModelPatcher":
        clone = ModelPatcher(self.model)
        clone.model_options = copy.deepcopy(self.model_options)
        return clone

    def set_model_attn1_patch(self, patch: Any) -> None:
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches["attn1_patch"] = [*patches.get("attn1_patch", []), patch]

    def set_model_attn1_replace(
        self, patch: Any, block_name: str, number: int, transformer_index: int | None = None
    ) -> None:
        position = (block_name, number) if transformer_index is None else (block_name, number, transformer_index)
        options = self.model_options["transformer_options"]
        options.setdefault("patches_replace", {}).setdefault("attn1", {})[position] = patch


def sample(patcher: ModelPatcher, x: Tensor, sigma: float, context: Tensor, **extra: Any) -> Tensor:
    """One call of the denoiser, as the sampler makes it."""
    sigmas = torch.full((len(x),), sigma, dtype=x.dtype)
    options = {**patcher.model_options["transformer_options"], "sigmas": sigmas, "cond_or_uncond": [0], **extra}
    model = patcher.model
    return model.diffusion_model(x, model.model_sampling.timestep(sigmas), context, transformer_options=options)


def build(xl: bool = False) -> UNetModel:
    """A UNet with random weights and self-attention sharp enough that its acceleration shows."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = UNetModel(xl=xl).double().eval().requires_grad_(False)
    for name, weights in unet.named_parameters():
        if "attn1.to_q" in name or "attn1.to_k" in name:
            weights.mul_(4)
    return unet


def inputs(height: int = 16, width: int = 12, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = (batch, 4, height, width), (batch, 3, 8)
    x, context = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, context


def grid_at(x: Tensor, layer: ldm.SelfAttentionLayer) -> tuple[int, int]:
    """Height and width of a layer's token grid, whose sides of the latent are multiples of 4."""
    return x.shape[-2] >> layer.level - 1, x.shape[-1] >> layer.level - 1


def layer_calls(
    unet: nn.Module, last: Literal["attn1", "to_out"], run: Callable[[], Tensor]
) -> list[tuple[ldm.SelfAttentionLayer, Tensor, Tensor, Tensor]]:
    """Of each attention in a call: the layer, the block's input, the normed tokens, what the `last` module says."""
    calls, handles = [], []
    for layer in ldm.find_layers(unet):
        seen: dict[str, Tensor] = {}

        def norm(_: Any, args: Any, out: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen["x"], seen["n"] = args[0], out

        def done(_: Any, args: Any, out: Tensor, seen: Any = seen, layer: ldm.SelfAttentionLayer = layer) -> None:
            calls.append((layer, seen["x"], seen["n"], out))

        handles += [layer.block.norm1.register_forward_hook(norm)]
        module = layer.block.attn1 if last == "attn1" else layer.block.attn1.to_out
        handles += [module.register_forward_hook(done)]
    run()
    for handle in handles:
        handle.remove()
    return calls


def by_diffusers(
    unet: nn.Module,
    config: AgentSDConfig,
    layer: ldm.SelfAttentionLayer,
    metric: Tensor,
    n: Tensor,
    grid: tuple[int, int],
    timestep: int,
) -> Tensor:
    """What the processor for diffusers makes of a layer's tokens with its weights, matched by `metric`."""
    attn = Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS).double()
    attn.load_state_dict(layer.block.attn1.state_dict())
    planner = Planner(config, (found.level for found in ldm.find_layers(unet)))
    plan = planner.plan(layer.level, grid, timestep, 1000, "cpu")
    state = BlockState({layer.level: plan} if plan else {}, layer.level, metric)
    return AgentSDProcessor(AttnProcessor2_0(), state)(attn, n)
