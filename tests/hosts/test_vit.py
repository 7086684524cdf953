"""Vision transformers whose attention becomes agent attention: the same weights, the reference's numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agentsd.nn import AgentAttention, convert_state_dict, convert_vit
from agentsd.nn.vit import attention_layers
from reference_nn import authors_state, reference

Factory = Any


def timm_vit(**options: Any) -> Any:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    defaults = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.models.VisionTransformer(**defaults | options).double().eval()


def timm_pvt(**options: Any) -> Any:
    pytest.importorskip("timm")
    from timm.models.pvt_v2 import PyramidVisionTransformerV2

    torch.manual_seed(0)
    defaults = {"depths": (1, 1), "embed_dims": (4, 8), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
    return PyramidVisionTransformerV2(num_classes=3, **defaults | options).double().eval()


def timm_swin() -> Any:
    pytest.importorskip("timm")
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    return (
        SwinTransformer(
            img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 2), num_classes=3
        )
        .double()
        .eval()
    )


def transformers_vit(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        image_size=16, patch_size=4, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    return getattr(transformers, f"{kind}Model")(config, add_pooling_layer=False).double().eval()


class Inputs:
    """What the attention layers of a model are called with, and what they return."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.seen: dict[str, tuple[Any, Any]] = {}
        for name in names:
            model.get_submodule(name).register_forward_hook(self.keep(name))

    def keep(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self.seen[name] = (args, out[0] if isinstance(out, tuple) else out)

        return hook


def own_parameters(model: nn.Module, name: str, grid: tuple[int, int], prefix: int, sr: int = 1) -> dict[str, Tensor]:
    """Random bias and convolution for one layer, put into the model through the key map."""
    module = model.get_submodule(name)
    assert isinstance(module, AgentAttention)
    state = authors_state(module.dim, module.num_heads, module.agent_num, grid, prefix=prefix, sr=sr)
    added = {key: value for key, value in state.items() if key.endswith("_bias") or key.startswith("dwc")}
    full = convert_state_dict({f"{name}.{key}": value for key, value in added.items()})
    assert model.load_state_dict(full, strict=False).unexpected_keys == []
    return added


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_timm_vit(options: dict[str, Any]) -> None:
    model = timm_vit(**options)
    prefix = model.num_prefix_tokens
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert convert_vit(model, agent_num=4) is model
    added = own_parameters(model, "blocks.1.attn", (4, 4), prefix)
    inputs = Inputs(model, ["blocks.1.attn"])
    model(torch.randn(1, 3, 16, 16, dtype=torch.float64))
    (x,), out = inputs.seen["blocks.1.attn"]
    layer = {key.removeprefix("blocks.1.attn."): value for key, value in before.items()}
    torch.testing.assert_close(out[0], reference(layer | added, x[0], (4, 4), 2, 4, prefix))
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_transformers_vit(kind: str) -> None:
    model = transformers_vit(kind)
    prefix = 1 if kind == "ViT" else 2
    (layer_name, *_) = attention_layers(model)
    layer = model.get_submodule(layer_name)
    separate = ("q_proj", "k_proj", "v_proj") if hasattr(layer, "q_proj") else ("query", "key", "value")
    stock = {
        f"qkv.{part}": torch.cat([getattr(layer, name).get_parameter(part) for name in separate]).detach()
        for part in ("weight", "bias")
    }
    proj = layer.o_proj if hasattr(layer, "o_proj") else nn.Identity()
    eye = {"weight": torch.eye(8, dtype=torch.float64), "bias": torch.zeros(8, dtype=torch.float64)}
    stock |= {f"proj.{part}": value for part, value in (dict(proj.named_parameters()) or eye).items()}

    convert_vit(model, agent_num=4)
    added = own_parameters(model, layer_name, (4, 4), prefix)
    inputs = Inputs(model, [layer_name])
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    assert model(pixels).last_hidden_state.shape == (1, prefix + 16, 8)
    args, out = inputs.seen[layer_name]
    torch.testing.assert_close(out[0], reference(stock | added, args[0][0], (4, 4), 2, 4, prefix))


def test_pyramid() -> None:
    model = timm_pvt()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    convert_vit(model, agent_num=[4, 1], image_size=(16, 32))
    names = ["stages.0.blocks.0.attn", "stages.1.blocks.0.attn"]
    inputs = Inputs(model, names)
    first = own_parameters(model, names[0], (4, 8), 0, sr=2)
    second = own_parameters(model, names[1], (2, 4), 0)
    model(torch.randn(1, 3, 16, 32, dtype=torch.float64))
    for name, grid, heads, agents, sr, added in (
        (names[0], (4, 8), 1, 4, 2, first),
        (names[1], (2, 4), 2, 1, 1, second),
    ):
        (x, feat_size), out = inputs.seen[name]
        assert tuple(feat_size) == grid
        stock = {key.removeprefix(f"{name}."): value for key, value in before.items() if key.startswith(name)}
        torch.testing.assert_close(out[0], reference(stock | added, x[0], grid, heads, agents, sr=sr))
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 3)


def test_windows() -> None:
    """Shifted windows too: what comes round the border is seen like any other token of the window."""
    model = timm_swin()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    convert_vit(model, agent_num=4, layers=[0, 1])
    name = "layers.0.blocks.1.attn"
    added = own_parameters(model, name, (4, 4), 0)
    inputs = Inputs(model, [name])
    model(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    (x,), out = inputs.seen[name]
    stock = {key.removeprefix(f"{name}."): value for key, value in before.items() if key.startswith(name)}
    assert len(x) == 4
    for window, expected in zip(x, out, strict=True):
        torch.testing.assert_close(expected, reference(stock | added, window, (4, 4), 2, 4))
    assert type(model.layers[1].blocks[0].attn).__name__ == "WindowAttention"


def test_windows_of_another_size() -> None:
    model = convert_vit(timm_swin(), agent_num=4)
    model.set_input_size(img_size=(48, 48), window_size=6)
    assert model(torch.randn(1, 3, 48, 48, dtype=torch.float64)).shape == (1, 3)
    assert model.layers[0].blocks[0].attn.grid == (6, 6)


def test_conversion_starts_from_plain_agent_attention() -> None:
    """Bias and convolution are zero until they are trained, and then they do change."""
    plain = convert_vit(timm_vit(), agent_num=4, agent_bias=False, dwc=False)
    model = convert_vit(timm_vit(), agent_num=4)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x))
    model(x).square().sum().backward()
    first = model.blocks[0].attn
    assert [name for name, value in first.named_parameters() if value.grad is None or not value.grad.any()] == []
    drawn = convert_vit(timm_vit(), agent_num=4, zero_init=False)
    assert drawn.blocks[0].attn.b1.map.any()


def test_weights_of_the_authors_load_into_a_converted_model() -> None:
    model = convert_vit(timm_vit(), agent_num=4)
    theirs = timm_vit().state_dict()
    for block in range(2):
        state = authors_state(8, 2, 4, (4, 4), prefix=1, seed=block)
        theirs |= {f"blocks.{block}.attn.{name}": value for name, value in state.items()}
    model.load_state_dict(convert_state_dict(theirs))
    torch.testing.assert_close(model.blocks[1].attn.b2.columns, theirs["blocks.1.attn.wa_bias"][0, :, 0].mT)


def test_training_a_converted_model_with_dropout() -> None:
    model = convert_vit(timm_vit(attn_drop_rate=0.5, proj_drop_rate=0.25), agent_num=4, layers=[0])
    attn = model.blocks[0].attn
    assert (attn.attn_drop, attn.proj_drop.p, attn.training) == (0.5, 0.25, False)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_conversion_keeps_dtype_and_device() -> None:
    model = convert_vit(timm_vit().bfloat16(), agent_num=4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in convert_vit(timm_vit().to("meta"), 4).parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (timm_vit, {"layers": [2]}, "layers has 2; VisionTransformer has layers 0 to 1"),
        (timm_vit, {"agent_num": [4]}, "agent_num has 1 numbers; there are 2 layers to convert"),
        (timm_vit, {"agent_num": 5}, "agent_num is 5; it must be a square number"),
        (timm_pvt, {}, "image_size is None and PyramidVisionTransformerV2 does not know its own"),
        (lambda: timm_pvt(linear=True), {}, r"stages.0.blocks.0.attn is a Attention with kv, norm, proj, q, sr"),
        (lambda: timm_vit(qk_norm=True), {"layers": [1]}, "blocks.1.attn is a Attention with k_norm, proj, q_norm"),
        (lambda: convert_vit(timm_vit(), 4), {}, "blocks.0.attn is agent attention already"),
        (lambda: nn.ModuleList(timm_vit().blocks), {}, "ModuleList has neither num_prefix_tokens nor config"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "Sequential has no attention layer"),
    ],
)
def test_errors_name_the_layer_and_change_nothing(factory: Factory, options: dict[str, Any], message: str) -> None:
    model = factory()
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        convert_vit(model, **{"agent_num": 4} | options)
    assert [id(module) for module in model.modules()] == before


def test_another_scale_is_not_understood() -> None:
    model = timm_vit()
    model.blocks[0].attn.scale = 1.0
    with pytest.raises(ValueError, match=r"blocks.0.attn is a Attention .* scale"):
        convert_vit(model, agent_num=4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: convert_vit(timm_vit(), 4).blocks[0].attn(torch.randn(1, 17, 8).double(), attn_mask=torch.ones(17, 17)),
        lambda: convert_vit(timm_vit(), 4).blocks[0].attn(torch.randn(1, 17, 8).double(), is_causal=True),
    ],
)
def test_masks_of_token_pairs_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match="agent attention has no mask of token pairs"):
        call()
