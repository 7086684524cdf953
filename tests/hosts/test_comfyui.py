"""The ComfyUI node, on a thin host that calls its hooks as ComfyUI does, with real tensors."""

import asyncio
import importlib.util
import logging
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import agentsd
from agentsd import AgentSDConfig, Merge, Phase, StepCache
from agentsd.hosts import ldm
from ldm_host import (
    GROUPS,
    STOCK,
    VARIANTS,
    Model,
    ModelPatcher,
    Sampling,
    UNetModel,
    build,
    by_diffusers,
    grid_at,
    host_attention,
    inputs,
    layer_calls,
    sample,
)

FOLDER = Path(ldm.__file__).parent / "comfyui"


@pytest.fixture(scope="module")
def comfy_attention() -> Iterator[None]:
    """`comfy.ldm.modules.attention`, which the node takes its softmax from."""
    names = ["comfy", "comfy.ldm", "comfy.ldm.modules", "comfy.ldm.modules.attention"]
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-1]].optimized_attention = host_attention  # type: ignore[attr-defined]
    modules[names[-2]].attention = modules[names[-1]]  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


def load(folder: Path, name: str) -> Any:
    """Import a folder of custom_nodes as ComfyUI does: by its path, under a name of no package."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for key in [key for key in sys.modules if key == name or key.startswith(name + ".")]:
            del sys.modules[key]
    return module


@pytest.fixture(scope="module")
def node(comfy_attention: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`node(model, preset="paper", **inputs)`, what the linked folder's node returns."""
    link = tmp_path_factory.mktemp("custom_nodes") / "agentsd"
    link.symlink_to(FOLDER, target_is_directory=True)
    kind = load(link, "/comfyui/custom_nodes/agentsd").NODE_CLASS_MAPPINGS["AgentSD"]
    required = kind.INPUT_TYPES()["required"]

    def run(model: Any, **given: Any) -> Any:
        defaults = {name: limits["default"] for name, (_, limits) in required.items() if name != "model"}
        (out,) = getattr(kind(), kind.FUNCTION)(model=model, **defaults | given)
        return out

    return run


@pytest.fixture(scope="module", params=["sd", "xl"])
def model(request: pytest.FixtureRequest) -> ModelPatcher:
    return ModelPatcher(Model(build(xl=request.param == "xl")))


def attach(model: ModelPatcher, config: AgentSDConfig) -> ModelPatcher:
    def function(q: Tensor, k: Tensor, v: Tensor, heads: int, extra: dict[str, Any]) -> Tensor:
        return host_attention(q, k, v, heads)

    return ldm.attach(model, config, lambda host: host.model_sampling, function)


@pytest.mark.parametrize("hints", ["activations_shape", "original_shape"])
@pytest.mark.parametrize("name", VARIANTS)
def test_attention_is_that_of_the_processor_for_diffusers(model: ModelPatcher, name: str, hints: str) -> None:
    config, unet = VARIANTS[name], model.model.diffusion_model
    patched = attach(model, config)
    x, context = inputs(20, 12)
    newer = {"activations_shape": None} if hints == "activations_shape" else {}
    stock, layers = 0, len(ldm.find_layers(unet))
    for timestep in (900, 300):
        sigma = model.model.model_sampling.sigmas[timestep].item()
        for layer, _, n, out in layer_calls(unet, "to_out", partial(sample, patched, x, sigma, context, **newer)):
            args = layer, n, n, grid_at(x, layer), timestep
            assert (out - by_diffusers(unet, config, *args)).abs().max() < 1e-9
            stock += torch.allclose(out, by_diffusers(unet, STOCK, *args))
    assert stock < 2 * layers


def test_clones_do_not_meet(model: ModelPatcher, node: Callable[..., Any]) -> None:
    x, context = inputs()

    def draw(patcher: ModelPatcher, sigma: float = 9.0) -> Tensor:
        return sample(patcher, x, sigma, context)

    stock = draw(model)
    assert node(model, enabled=False) is model
    paper, faithful = node(model), node(model, preset="faithful")
    alone = [draw(paper), draw(faithful)]
    assert not torch.equal(alone[0], stock)
    assert not torch.equal(alone[1], stock)
    assert not torch.equal(*alone)
    for _ in range(2):
        assert torch.equal(draw(paper.clone()), alone[0])
        draw(paper, 0.1)
        assert torch.equal(draw(faithful), alone[1])
        assert torch.equal(draw(model), stock)
    assert torch.equal(draw(node(paper, preset="faithful")), alone[1])
    assert not torch.equal(draw(node(model, seed=1)), alone[0])


def test_both_halves_of_guidance_see_the_same_destinations(model: ModelPatcher, node: Callable[..., Any]) -> None:
    patched = node(model)
    x, context = inputs()
    together = sample(patched, x, 9.0, context)
    apart = torch.cat([sample(patched, x[i : i + 1], 9.0, context[i : i + 1]) for i in range(2)])
    assert torch.allclose(together, apart, atol=1e-12)


class Reads(TorchDispatchMode):
    """Counts what waits for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("config", "reads"), [(AgentSDConfig(), 1), (GROUPS, 1), (GROUPS.replace(seed=None), 0)])
def test_the_noise_level_is_read_once_a_call_at_most(model: ModelPatcher, config: AgentSDConfig, reads: int) -> None:
    patched = attach(model, config)
    x, context = inputs()
    for sigma in (9.0, 0.5):
        with Reads() as counter:
            sample(patched, x, sigma, context)
        assert counter.count == reads


def test_timesteps_are_those_of_the_schedule() -> None:
    sampling, clock = Sampling(), ldm.Sigmas()
    for timestep in (0, 1, 399, 600, 999):
        sigma = sampling.sigmas[timestep : timestep + 1] * 1.0001
        assert clock.timestep(sigma, sampling.log_sigmas) == sampling.timestep(sigma).item() == timestep


def test_what_other_nodes_have_changed_is_skipped(
    model: ModelPatcher, node: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    x, context = inputs()
    module = next(layer.module for layer in ldm.find_layers(model.model.diffusion_model))
    other = model.clone()
    other.set_model_attn1_replace(lambda q, k, v, extra: v, *module)
    with caplog.at_level(logging.WARNING):
        both = node(other)
    assert f"AgentSD skips the self-attention of {module[0]} {module[1]}:" in caplog.text
    calls = layer_calls(model.model.diffusion_model, "to_out", lambda: sample(both, x, 9.0, context))
    (layer, _, n, out), *_ = (call for call in calls if call[0].module == module)
    assert torch.equal(out, layer.block.attn1.to_out(layer.block.attn1.to_v(n)))

    # As reference images do: the keys and values are those of more tokens.
    def reference(n: Tensor, context: Tensor, value: Tensor, extra: Any) -> tuple[Tensor, Tensor, Tensor]:
        return n, torch.cat([context, n], 1), torch.cat([value, n], 1)

    referring = model.clone()
    referring.set_model_attn1_patch(reference)
    expected = sample(referring, x, 9.0, context)
    assert torch.equal(sample(node(referring), x, 9.0, context), expected)
    late = node(model)
    late.set_model_attn1_patch(reference)
    assert torch.equal(sample(late, x, 9.0, context), expected)


def test_what_cannot_be_done_is_said(model: ModelPatcher, node: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="Linear; it must be a UNet"):
        node(ModelPatcher(Model(nn.Linear(1, 1))))
    with pytest.raises(ValueError, match=r"levels is \[\[7\]\]"):
        attach(model, AgentSDConfig(phases=(Phase(levels=(7,)),)))
    with pytest.raises(ValueError, match=r"parts is \['mlp'\]; there are hooks for attn only"):
        attach(model, AgentSDConfig(phases=(Phase(attention=Merge(parts=("mlp",))),)))
    for config in (AgentSDConfig.from_preset("turbo"), AgentSDConfig(steps=(StepCache(),))):
        with pytest.raises(ValueError, match="the step cache is for diffusers only"):
            attach(model, config)
    assert "turbo" not in ldm.presets()
    with pytest.raises(ValueError, match=r"ratio is 0\.8; with stride 2"):
        node(model, preset="custom", ratio=0.8)


def test_custom_inputs_make_the_published_configuration(model: ModelPatcher, node: Callable[..., Any]) -> None:
    x, context = inputs()
    for sigma in (9.0, 0.5):
        assert torch.equal(
            sample(node(model, preset="custom"), x, sigma, context), sample(node(model), x, sigma, context)
        )
    stock = node(model, preset="custom", first_attention="stock", second_attention="stock")
    assert torch.equal(sample(stock, x, 9.0, context), sample(model, x, 9.0, context))
    kv = node(model, preset="custom", first_until=1.0, first_attention="kv", first_stride=2)
    assert torch.equal(sample(kv, x, 9.0, context), sample(node(model, preset="faithful"), x, 9.0, context))
    wider = node(model, preset="custom", first_until=1.0, first_attention="kv", first_stride=2, levels=2)
    assert not torch.equal(sample(wider, x, 9.0, context), sample(kv, x, 9.0, context))


def test_current_schema_says_what_the_older_one_says(comfy_attention: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`comfy_api.latest` as far as the node needs it, with the keyword arguments that it documents."""

    def input_of(kind: str) -> Any:
        class Input:
            def __init__(
                self,
                id: str,
                options: list[str] | None = None,
                tooltip: str | None = None,
                default: Any = None,
                min: float | None = None,
                max: float | None = None,
                step: float | None = None,
            ) -> None:
                given = {"default": default, "min": min, "max": max, "step": step, "tooltip": tooltip}
                self.id, self.kind = id, options or kind
                self.limits = {name: value for name, value in given.items() if value is not None}

        return types.SimpleNamespace(Input=Input, Output=types.SimpleNamespace)

    class Schema(types.SimpleNamespace):
        pass

    io = types.SimpleNamespace(
        ComfyNode=object,
        Schema=Schema,
        NodeOutput=lambda *values: types.SimpleNamespace(result=values),
        Boolean=input_of("BOOLEAN"),
        Combo=input_of("COMBO"),
        Float=input_of("FLOAT"),
        Int=input_of("INT"),
        Model=input_of("MODEL"),
    )
    old = load(FOLDER, "old").NODE_CLASS_MAPPINGS["AgentSD"].INPUT_TYPES()["required"]
    latest = types.ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy_api", types.ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    module = load(FOLDER, "new")
    assert not hasattr(module, "NODE_CLASS_MAPPINGS"), "ComfyUI would take the older nodes"
    (kind,) = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
    schema = kind.define_schema()
    assert {item.id: (item.kind, item.limits) for item in schema.inputs} == old
    assert all(len(limits["tooltip"]) > 20 for _, limits in old.values())
    assert len(schema.outputs) == 1
    x, context = inputs()
    patcher = ModelPatcher(Model(UNetModel().double()))
    defaults = {item.id: item.limits["default"] for item in schema.inputs if item.id != "model"}
    (accelerated,) = kind.execute(model=patcher, **defaults).result
    assert not torch.equal(sample(accelerated, x, 9.0, context), sample(patcher, x, 9.0, context))
    (same,) = kind.execute(model=patcher, **defaults | {"enabled": False}).result
    assert same is patcher


def test_registry_metadata() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert project["project"]["name"] == "agentsd"
    assert project["project"]["version"] == agentsd.__version__
    assert project["tool"]["comfy"]["DisplayName"] == "AgentSD"
