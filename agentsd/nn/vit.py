"""Vision transformers of timm and transformers: agent attention instead of softmax attention."""

import copy
import inspect
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from agentsd.nn.attention import AgentAttention, Grid

Model = TypeVar("Model", bound=nn.Module)


class ViTAgentAttention(AgentAttention):
    """Called as timm's ViT calls its attention."""

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        _no_pairs(attn_mask, is_causal)
        return super().forward(x)


class PyramidAgentAttention(AgentAttention):
    """Called as PVT calls its attention: with the grid, as one argument or two."""

    def forward(self, x: Tensor, *grid: Any) -> Tensor:  # type: ignore[override]
        H, W = grid if len(grid) == 2 else grid[0]
        return super().forward(x, (H, W))


class WindowAgentAttention(AgentAttention):
    """Called as Swin calls its attention: with the tokens of one window, and the mask of shifted windows.

    A mask of token pairs has no counterpart in agent attention; shifted windows do without, as in the authors' code.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)

    def set_window_size(self, window_size: Grid) -> None:
        """The windows are of another size: the bias is resized in the call."""
        self.grid = window_size


class TransformersAgentAttention(AgentAttention):
    """Called as transformers' ViT calls its attention; there are no attention maps to return."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        _no_pairs(attention_mask)
        return super().forward(hidden_states), None


def _no_pairs(mask: Tensor | None, is_causal: bool = False) -> None:
    if mask is not None or is_causal:
        raise ValueError("attn_mask or is_causal is given; agent attention has no mask of token pairs")


def convert_vit(
    model: Model,
    agent_num: int | Sequence[int] = 49,
    layers: Iterable[int] | None = None,
    *,
    agent_bias: bool = True,
    dwc: bool = True,
    zero_init: bool = True,
    image_size: int | Grid | None = None,
) -> Model:
    """Replace a vision transformer's softmax attention by agent attention with the same weights.

    Understood are the ViT and DeiT of timm and transformers, pyramids called with their grid (PVT v2 of timm) and
    windows with a table of relative positions (Swin of timm). The table goes; so does the mask of shifted windows.

    Args:
        model: changed in place.
        agent_num: agents of every converted layer, or one number for each.
        layers: which self-attention layers to convert, counted from 0 in the order of the modules; None is all. The
            paper converts the first stages of PVT and Swin.
        agent_bias, dwc: as in `AgentAttention`.
        zero_init: bias and convolution start at zero, which leaves a trained model least disturbed; False is the
            paper's initialisation, for training from scratch.
        image_size: height and width (or the side) of the images, for pyramids; None asks the model.

    Returns:
        The same model.

    Raises:
        ValueError: a layer is not understood (the message names it), or an option is out of range. Nothing is changed.

    Example:
        ```python
        model = timm.create_model("deit_tiny_patch16_224", pretrained=True)
        agentsd.nn.convert_vit(model, agent_num=49)
        ```
    """
    every = attention_layers(model)
    if not every:
        raise ValueError(f"{type(model).__name__} has no attention layer")
    chosen = list(dict.fromkeys(range(len(every)) if layers is None else layers))
    if outside := [index for index in chosen if not 0 <= index < len(every)]:
        raise ValueError(f"layers has {outside[0]}; {type(model).__name__} has layers 0 to {len(every) - 1}")
    numbers = [agent_num] * len(chosen) if isinstance(agent_num, int) else list(agent_num)
    if len(numbers) != len(chosen):
        raise ValueError(f"agent_num has {len(numbers)} numbers; there are {len(chosen)} layers to convert")
    names = [every[index] for index in chosen]
    understood = {name: understand(name, model.get_submodule(name)) for name in names}
    pyramid = any(kind is PyramidAgentAttention for kind, _ in understood.values())
    grids = _pyramid_grids(model, names, image_size) if pyramid else {}
    converted = {}
    for number, (name, (kind, option)) in zip(numbers, understood.items(), strict=True):
        old: Any = model.get_submodule(name)
        if kind is WindowAgentAttention:
            option["grid"] = _side(old.window_size)
        elif kind is PyramidAgentAttention:
            option["grid"] = grids[name]
        else:
            option["grid"], option["class_token"] = _tokens(model)
        new = kind(agent_num=number, agent_bias=agent_bias, dwc=dwc, **option)
        converted[name] = _with_weights(new, old, zero_init)
    for name, new in converted.items():
        model.set_submodule(name, new)
    return model


def attention_layers(model: nn.Module) -> list[str]:
    """The names of the innermost modules that are attention by the name of their class, pooling heads aside."""
    found: list[str] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "Attention" in kind and "Pool" not in kind:
            found = [outer for outer in found if not name.startswith(f"{outer}.")] + [name]
    return found


def understand(name: str, attn: Any) -> tuple[type[AgentAttention], dict[str, Any]]:
    """The kind of agent attention that a layer becomes, and its options but for the grid and the agents."""
    if isinstance(attn, AgentAttention):
        raise ValueError(f"{name} is agent attention already; leave it out of layers")
    parts = {parameter.partition(".")[0] for parameter, _ in attn.named_parameters()}
    arguments = [key for key in inspect.signature(attn.forward).parameters if key != "kwargs"]
    kind = _kind(attn, parts, arguments)
    if kind is not None:
        weight, bias = _qkv(attn)
        dim, heads = weight.shape[1], attn.num_heads if hasattr(attn, "num_heads") else attn.num_attention_heads
        usual = (dim // heads) ** -0.5
        scale = next((getattr(attn, key) for key in ("scale", "scaling") if hasattr(attn, key)), usual)
        drop = next(getattr(attn, key) for key in ("attn_drop", "attention_dropout", "dropout") if hasattr(attn, key))
        if len(weight) == 3 * dim and abs(scale - usual) < 1e-6:
            return kind, {
                "dim": dim,
                "num_heads": heads,
                "qkv_bias": bias is not None,
                "sr_ratio": attn.sr.stride[0] if "sr" in parts else 1,
                "attn_drop": drop.p if isinstance(drop, nn.Dropout) else drop,
            }
    raise ValueError(
        f"{name} is a {type(attn).__name__} with {', '.join(sorted(parts))}, called with {', '.join(arguments)}; "
        "that, or its scale, is not what convert_vit understands: leave it out of layers"
    )


def _kind(attn: Any, parts: set[str], arguments: list[str]) -> type[AgentAttention] | None:
    if parts == {"qkv", "proj"} and arguments[:1] == ["x"] and {"x", "attn_mask", "is_causal"} >= set(arguments):
        return ViTAgentAttention
    if parts == {"qkv", "proj", "relative_position_bias_table"} and arguments == ["x", "mask"]:
        return WindowAgentAttention
    reduced = {"q", "kv", "proj"}, {"q", "kv", "proj", "sr", "norm"}
    # PVT v2-Li pools keys and values to a fixed size instead.
    if parts in reduced and arguments in (["x", "feat_size"], ["x", "H", "W"]) and getattr(attn, "pool", None) is None:
        return PyramidAgentAttention
    separate = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"query", "key", "value"}
    known = {"hidden_states", "attention_mask", "head_mask", "output_attentions"}
    if parts in separate and arguments[:1] == ["hidden_states"] and known >= set(arguments):
        return TransformersAgentAttention
    return None


def _qkv(attn: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the projection to Q, K and V in one."""
    together = (("qkv",), ("q", "kv"), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
    linears = [getattr(attn, name) for name in next(names for names in together if hasattr(attn, names[0]))]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    return weight, None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])


def _with_weights(new: AgentAttention, old: Any, zero_init: bool) -> AgentAttention:
    weight, bias = _qkv(old)
    new.to(weight)
    with torch.no_grad():
        new.qkv.weight.copy_(weight)
        if bias is not None:
            new.qkv.bias.copy_(bias)
        for part in (new.b1, new.b2, new.dwc) if zero_init else ():
            for parameter in part.parameters() if part is not None else ():
                parameter.zero_()
    for name in ("proj_drop", "sr", "norm"):
        if hasattr(new, name) and hasattr(old, name):
            setattr(new, name, getattr(old, name))
    # transformers 4 keeps the output projection in another module.
    new.proj = next((getattr(old, name) for name in ("proj", "o_proj") if hasattr(old, name)), nn.Identity())
    return new.train(old.training)


def _side(size: int | Sequence[int]) -> Grid:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _tokens(model: Any) -> tuple[Grid, int]:
    """The grid of a ViT, and how many tokens come before it."""
    if hasattr(model, "num_prefix_tokens"):
        return _side(model.patch_embed.grid_size), model.num_prefix_tokens
    if not hasattr(model, "config"):
        raise ValueError(
            f"{type(model).__name__} has neither num_prefix_tokens nor config, which tell the tokens of a ViT's grid"
        )
    image, patch = _side(model.config.image_size), _side(model.config.patch_size)
    H, W = image[0] // patch[0], image[1] // patch[1]
    positions = next(value for name, value in model.named_parameters() if name.endswith("position_embeddings"))
    return (H, W), positions.shape[1] - H * W


@torch.no_grad()
def _pyramid_grids(model: Any, names: Sequence[str], image_size: int | Grid | None) -> dict[str, Grid]:
    """The grid that each layer is called with, found by a call with an empty image."""
    if image_size is None and not hasattr(model, "pretrained_cfg"):
        raise ValueError(f"image_size is None and {type(model).__name__} does not know its own; pass (height, width)")
    H, W = _side(model.pretrained_cfg["input_size"][1:] if image_size is None else image_size)
    probe = copy.deepcopy(model).eval()
    grids: dict[str, Grid] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        grids[name] = _side(args[1] if len(args) == 2 else args[1:])

    for name in names:
        probe.get_submodule(name).register_forward_pre_hook(partial(note, name))
    first = next(module for module in probe.modules() if isinstance(module, nn.Conv2d))
    probe(torch.zeros(1, first.in_channels, H, W).to(first.weight))
    return grids
