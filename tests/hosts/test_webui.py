"""The extension for AUTOMATIC1111 and Forge, on thin hosts that call it as they do, with real tensors."""

import importlib.util
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agentsd.hosts import ldm
from ldm_host import (
    GROUPS,
    VARIANTS,
    Model,
    ModelPatcher,
    build,
    by_diffusers,
    grid_at,
    host_attention,
    inputs,
    layer_calls,
    sample,
)

FOLDER = Path(ldm.__file__).parent / "webui"


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("xl", [False, True])
def test_hooks_on_modules_do_what_the_processor_for_diffusers_does(xl: bool, name: str) -> None:
    config, unet = VARIANTS[name], build(xl=xl)
    x, context = inputs(20, 12)
    before = unet(x, torch.tensor([900, 900]), context)
    ldm.apply(unet, GROUPS)
    ldm.apply(unet, config)
    for timestep in (900, 300):
        times = torch.full((2,), float(timestep))
        for layer, metric, n, out in layer_calls(unet, "attn1", partial(unet, x, times, context)):
            expected = by_diffusers(unet, config, layer, metric, n, grid_at(x, layer), timestep)
            assert (out - expected).abs().max() < 1e-9
    ldm.remove(unet)
    ldm.remove(unet)
    assert torch.equal(unet(x, torch.tensor([900, 900]), context), before)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in unet.modules())


class Script:
    """What the WebUIs' `modules.scripts.Script` is to an extension."""

    infotext_fields: Any = None
    paste_field_names: Any = None


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script of a linked folder, as the WebUIs load it, and the modules that it finds there."""
    gradio = pytest.importorskip("gradio")
    scripts, shared, backend = (types.ModuleType(name) for name in ("modules.scripts", "modules.shared", "backend"))
    scripts.Script, scripts.AlwaysVisible, shared.loaded_hypernetworks = Script, object(), []  # type: ignore[attr-defined]
    modules = types.ModuleType("modules")
    modules.scripts, modules.shared = scripts, shared  # type: ignore[attr-defined]
    backend.attention = types.SimpleNamespace(attention_function=host_attention)  # type: ignore[attr-defined]
    for module in (modules, scripts, shared, backend):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / "agentsd").symlink_to(FOLDER, target_is_directory=True)
    spec = importlib.util.spec_from_file_location("scripts.agentsd", tmp_path / "agentsd" / "scripts" / "agentsd.py")
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return types.SimpleNamespace(script=loaded.AgentSDScript(), gradio=gradio, scripts=scripts, shared=shared)


class Image:
    """The processing object of one image, in AUTOMATIC1111 or in Forge."""

    def __init__(self, unet: nn.Module, forge: bool) -> None:
        self.extra_generation_params: dict[str, Any] = {}
        self.forge, self.model = forge, Model(unet)
        if forge:
            self.sd_model: Any = types.SimpleNamespace(
                forge_objects=types.SimpleNamespace(unet=ModelPatcher(self.model))
            )
        else:
            self.sd_model = types.SimpleNamespace(model=self.model, num_timesteps=1000)

    def draw(self, script: Any, *args: Any, fails: bool = False) -> Tensor:
        """Call the script as the hosts do around one call of the denoiser."""
        x, context = inputs()
        script.process(self, *args)
        script.process_batch(self, *args, batch_number=0, prompts=[""], seeds=[0], subseeds=[0])
        if self.forge:
            self.sd_model.forge_objects.unet = ModelPatcher(self.model)
        script.process_before_every_sampling(self, *args, x=x, noise=x, c=context, uc=context)
        if self.forge:
            out = sample(self.sd_model.forge_objects.unet, x, 9.0, context)
        else:
            out = self.model.diffusion_model(x, torch.tensor([900.0, 900.0]), context)
        if not fails:
            script.postprocess_batch(self, *args, batch_number=0, images=out)
        return out


@pytest.mark.parametrize("forge", [False, True])
def test_script_accelerates_and_writes_and_reads_its_parameters(extension: Any, forge: bool) -> None:
    unet, script = build(), extension.script
    assert script.show(False) is extension.scripts.AlwaysVisible
    with extension.gradio.Blocks():
        enabled, preset, ratio = script.ui(False)
    defaults = enabled.value, preset.value, ratio.value
    assert defaults == (False, "paper", 0.4)
    off = Image(unet, forge)
    stock = off.draw(script, *defaults)
    assert off.extra_generation_params == {}

    on = Image(unet, forge)
    accelerated = on.draw(script, True, "paper", 0.5)
    assert not torch.equal(accelerated, stock)
    assert on.extra_generation_params == {"AgentSD preset": "paper", "AgentSD ratio": 0.5}
    assert not torch.equal(Image(unet, forge).draw(script, True, "faithful", 0.5), accelerated)
    assert torch.equal(Image(unet, forge).draw(script, *defaults), stock)

    # As the hosts read it: text, or the control's own function of all of it; names sent from tab to tab.
    text = {name: str(value) for name, value in on.extra_generation_params.items()}
    read = {control: key(text) if callable(key) else text[key] for control, key in script.infotext_fields}
    assert (read[enabled], read[preset], float(read[ratio])) == (True, "paper", 0.5)
    assert script.infotext_fields[0][1]({"Steps": "20"}) is False
    assert set(script.paste_field_names) == on.extra_generation_params.keys()


def test_an_image_that_failed_leaves_nothing_behind(extension: Any) -> None:
    unet = build()
    stock = Image(unet, False).draw(extension.script, False, "paper", 0.4)
    Image(unet, False).draw(extension.script, True, "paper", 0.4, fails=True)
    assert torch.equal(Image(unet, False).draw(extension.script, False, "paper", 0.4), stock)


def test_hypernetworks_are_not_skipped(extension: Any) -> None:
    unet = build()
    stock = Image(unet, False).draw(extension.script, False, "paper", 0.4)
    extension.shared.loaded_hypernetworks.append("one")
    assert torch.equal(Image(unet, False).draw(extension.script, True, "paper", 0.4), stock)


@pytest.mark.parametrize("args", [("paper", 0.8), ("unknown", 0.4)])
def test_what_cannot_be_done_is_said_and_not_noted(
    extension: Any, args: tuple[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    image = Image(build(), True)
    image.draw(extension.script, True, *args)
    assert "AgentSD is not applied: " in caplog.text
    assert image.extra_generation_params == {}
