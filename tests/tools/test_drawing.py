"""Drawing prompts with seeds, and recording the UNet's calls."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from agentsd import pipelines
from agentsd.drawing import draw, generators, record_calls

CALL = {"num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_folder: Path) -> Any:
    return pipelines.load(str(tiny_pipeline_folder), device="cpu", dtype=torch.float32)


def test_each_image_has_a_generator_of_its_own() -> None:
    noise = [torch.randn(3, generator=generator) for generator in generators([5, 6, 5])]
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])


def test_images_do_not_depend_on_their_batch(pipe: Any) -> None:
    prompts, seeds = ["a red circle", "a blue star"], [3, 4]
    both = draw(pipe, prompts, seeds, output="np", **CALL).arrays
    assert both is not None
    for array, prompt, seed in zip(both, prompts, seeds, strict=True):
        alone = draw(pipe, prompt, seed, output="np", **CALL).arrays
        assert alone is not None
        assert np.allclose(alone[0], array, atol=1e-4)


def test_outputs(pipe: Any) -> None:
    drawn = draw(pipe, "a red circle", 3, **CALL)
    arrays = draw(pipe, "a red circle", 3, output="np", **CALL).arrays
    latents = draw(pipe, "a red circle", 3, output="latent", **CALL).arrays
    assert drawn.arrays is None
    assert drawn.seconds > 0
    assert not drawn.flagged
    assert arrays is not None
    assert latents is not None
    assert np.abs(np.asarray(drawn.images[0]) / 255 - arrays[0]).max() <= 0.5 / 255 + 1e-6
    assert latents.shape == (1, 4, 16, 16)
    assert latents.dtype == np.float32


@pytest.mark.parametrize("label", [None, "drawing"])
def test_the_progress_bar_is_shown_only_with_a_label(label: str | None, pipe: Any) -> None:
    before, during = dict(getattr(pipe, "_progress_bar_config", {})), list[dict[str, Any]]()
    with pipe.unet.register_forward_pre_hook(lambda *_: during.append(dict(pipe._progress_bar_config))):
        draw(pipe, "a red circle", 3, label=label, **CALL)
    assert during[0] == {"desc": label, "disable": True if label is None else None, "leave": False}
    assert pipe._progress_bar_config == before


def test_flagged_images_are_told() -> None:
    result = SimpleNamespace(images=["black"], nsfw_content_detected=[True])
    assert draw(lambda *_, **__: result, "anything", 0).flagged


def test_recorded_calls_can_be_repeated(pipe: Any) -> None:
    with record_calls(pipe.unet) as calls:
        draw(pipe, "a red circle", 3, **CALL)
    draw(pipe, "a red circle", 3, **CALL)
    assert len(calls) == 3
    assert [call.timestep for call in calls] == pipe.scheduler.timesteps.tolist()
    with torch.inference_mode():
        for call in calls:
            assert call.sample.shape == (2, 4, 16, 16)
            assert torch.equal(pipe.unet(*call.args, **call.kwargs)[0], call.output)
