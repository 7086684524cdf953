"""Loading pipelines: the demo model, folders, single files, and what is refused."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from agentsd import pipelines


def draw(pipe: Any, **options: Any) -> np.ndarray:
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"} | options
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red circle", **options).images[0]


def test_folder_is_loaded_as_it_is(tiny_pipeline_folder: Path, tiny_pipeline: Any) -> None:
    for model in (tiny_pipeline_folder, str(tiny_pipeline_folder)):
        pipe = pipelines.load(model, device="cpu")
        assert type(pipe) is type(tiny_pipeline)
        np.testing.assert_array_equal(draw(pipe), draw(tiny_pipeline))


def test_demo_is_the_default(tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentsd.demo.MODEL", tiny_pipeline_folder)
    assert pipelines.load().unet.config.block_out_channels == [16, 32]
    assert pipelines.find("demo") == tiny_pipeline_folder


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("bf16", torch.bfloat16), ("float16", torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_dtype(tiny_pipeline_folder: Path, dtype: Any, expected: torch.dtype) -> None:
    pipe = pipelines.load(tiny_pipeline_folder, dtype=dtype, device="cpu")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {expected}


def test_default_dtype_is_half_on_cuda() -> None:
    assert pipelines.find_dtype(None, torch.device("cuda")) == torch.float16
    assert pipelines.find_dtype(None, torch.device("cpu")) == torch.float32


def test_folder_with_half_precision_files_only(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pipeline_folder, tmp_path / "half")
    for file in [*tmp_path.rglob("*.safetensors")]:
        file.rename(file.with_suffix(".fp16.safetensors"))
    np.testing.assert_array_equal(
        draw(pipelines.load(tmp_path / "half", device="cpu")), draw(pipelines.load(tiny_pipeline_folder, device="cpu"))
    )


def test_sizes(tiny_pipeline_folder: Path, tiny_pipeline: Any, tiny_unet: Any, tmp_path: Path) -> None:
    assert pipelines.default_size(tiny_pipeline) == (64, 64)
    assert pipelines.size_multiple(tiny_pipeline) == pipelines.size_multiple(tiny_pipeline_folder) == 8
    assert pipelines.size_multiple(None) == 8
    (tmp_path / "vae").mkdir()
    for key in ("block_out_channels", "decoder_block_out_channels"):
        (tmp_path / "vae" / "config.json").write_text(json.dumps({key: [8] * 5}))
        assert pipelines.size_multiple(tmp_path) == 16
    tiny_pipeline.vae_scale_factor = 16
    assert pipelines.size_multiple(tiny_pipeline) == 16
    tiny_pipeline.unet = tiny_unet(sample_size=(8, 24))
    assert pipelines.default_size(tiny_pipeline) == (24 * 16, 8 * 16)


@pytest.mark.parametrize("name", pipelines.SCHEDULERS)
def test_schedulers_keep_the_models_noise_schedule(tiny_pipeline: Any, name: str) -> None:
    if name == "lms" and importlib.util.find_spec("scipy") is None:
        with pytest.raises(ValueError, match="needs the package scipy"):
            pipelines.set_scheduler(tiny_pipeline, name)
        return
    pipelines.set_scheduler(tiny_pipeline, name)
    class_name, _, sampler = pipelines.SCHEDULERS[name]
    assert type(tiny_pipeline.scheduler).__name__ == class_name
    assert tiny_pipeline.scheduler.config.beta_end == 0.012
    assert pipelines.sampler_name(tiny_pipeline) == sampler
    assert np.isfinite(draw(tiny_pipeline)).all()


def test_sampler_of_another_class_has_its_name(tiny_pipeline: Any) -> None:
    from diffusers import DEISMultistepScheduler

    tiny_pipeline.scheduler = DEISMultistepScheduler.from_config(tiny_pipeline.scheduler.config)
    assert pipelines.sampler_name(tiny_pipeline) == "DEISMultistepScheduler"


def test_tasks_share_the_modules(tiny_pipeline: Any) -> None:
    assert pipelines.for_task(tiny_pipeline) is tiny_pipeline
    image = pipelines.for_task(tiny_pipeline, image=True)
    assert type(image).__name__ == "StableDiffusionImg2ImgPipeline"
    mask = pipelines.for_task(tiny_pipeline, image=True, mask=True)
    assert type(mask).__name__ == "StableDiffusionInpaintPipeline"
    assert type(pipelines.for_task(mask)).__name__ == "StableDiffusionPipeline"
    assert image.unet is mask.unet is tiny_pipeline.unet


def test_inpainting_model_needs_a_mask(tiny_pipeline: Any, tiny_unet: Any) -> None:
    tiny_pipeline.unet = tiny_unet(in_channels=9)
    with pytest.raises(ValueError, match="made for inpainting"):
        pipelines.for_task(tiny_pipeline, image=True)
    assert type(pipelines.for_task(tiny_pipeline, image=True, mask=True)).__name__ == "StableDiffusionInpaintPipeline"


# Refused


def refused(model: str | Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        pipelines.load(model, **options)
    assert "\n" not in str(error.value)


def test_unknown_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nosuch", "unknown model 'nosuch'")
    refused("a/b/c", "unknown model 'a/b/c'")
    refused("org/file.safetensors", "unknown model")
    refused(tmp_path / "nosuch", "unknown model")
    refused("nobody/no-such-model", "could not be downloaded")


def test_folders_without_a_pipeline(tmp_path: Path, tiny_pipeline_folder: Path) -> None:
    refused(tmp_path, "holds no pipeline: there is no model_index.json")
    (tmp_path / "model_index.json").write_text("{")
    refused(tmp_path, "is not a pipeline index")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": []}')
    refused(tmp_path, "is not a pipeline index")
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline", "unet": ["diffusers", "X"]}')
    refused(tmp_path, "could not be loaded as a Stable Diffusion pipeline")


def test_damaged_folder(tmp_path: Path, tiny_pipeline_folder: Path) -> None:
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "damaged")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-100])
    refused(folder, "not a sound safetensors file")
    weights.unlink()
    refused(folder, "could not be loaded as a Stable Diffusion pipeline")
    weights.write_bytes(sound)
    (folder / "unet" / "config.json").write_text("{")
    refused(folder, "could not be loaded as a Stable Diffusion pipeline")


def test_pipeline_without_a_unet(tmp_path: Path) -> None:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    index = {"_class_name": DiTPipeline.__name__, "transformer": ["diffusers", "DiTTransformer2DModel"]}
    DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8, num_embeds_ada_norm=4
    ).save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refused(tmp_path, "DiTPipeline|could not be loaded")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickled_file_is_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    torch.save({}, file)
    refused(file, "is pickled and may run code when loaded")


def test_pickled_folder_is_refused_unless_allowed(tmp_path: Path, tiny_pipeline_folder: Path) -> None:
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "pickled")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    refused(folder, "is pickled and may run code when loaded")
    pipe = pipelines.load(folder, device="cpu", allow_pickle=True)
    np.testing.assert_array_equal(draw(pipe), draw(pipelines.load(tiny_pipeline_folder, device="cpu")))


@pytest.mark.parametrize("device", ["nosuch", "cuda:99", "meta"])
def test_devices_that_do_not_exist(tiny_pipeline_folder: Path, device: str) -> None:
    refused(tiny_pipeline_folder, f"device '{device}' does not exist here; there is .*cpu", device=device)


def test_out_of_memory_is_not_taken_for_a_bad_model(
    tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        pipelines.load(tiny_pipeline_folder)


def test_attention_backends(tiny_pipeline: Any) -> None:
    kinds = {}
    for name in ("sliced", "sdpa"):
        pipelines.set_attention_backend(tiny_pipeline, name)
        kinds[name] = {type(processor).__name__ for processor in tiny_pipeline.unet.attn_processors.values()}
    assert kinds == {"sliced": {"SlicedAttnProcessor"}, "sdpa": {"AttnProcessor2_0"}}
    with pytest.raises(ValueError, match="attention backend 'flash' cannot be used here"):
        pipelines.set_attention_backend(tiny_pipeline, "flash")
    if importlib.util.find_spec("xformers") is None:
        with pytest.raises(ValueError, match="needs the package xformers"):
            pipelines.set_attention_backend(tiny_pipeline, "xformers")


def test_fingerprint_is_that_of_the_web_ui(tmp_path: Path, tiny_pipeline_folder: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    assert pipelines.fingerprint(tmp_path / "a.safetensors") == "ba7816bf8f"
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "copy")
    assert pipelines.fingerprint(folder) == pipelines.fingerprint(tiny_pipeline_folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"abc")
    assert pipelines.fingerprint(folder) != pipelines.fingerprint(tiny_pipeline_folder)


# Single files


def test_single_file_gives_the_same_image_as_the_folder(
    tiny_pipeline_folder: Path, tiny_single_file: Path, tmp_path: Path
) -> None:
    pickled = tmp_path / "tiny.ckpt"
    torch.save({"state_dict": load_file(tiny_single_file)}, pickled)
    expected = draw(pipelines.load(tiny_pipeline_folder, device="cpu"))
    for file in (tiny_single_file, pickled):
        pipe = pipelines.load(file, device="cpu", config=tiny_pipeline_folder, allow_pickle=file == pickled)
        assert type(pipe).__name__ == "StableDiffusionPipeline"
        np.testing.assert_array_equal(draw(pipe), expected)


def test_single_file_needs_its_configuration(
    tiny_pipeline_folder: Path, tiny_single_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(tiny_single_file, "needs the configuration of .*, which is not on this machine and could not be downloaded")
    refused(tiny_single_file, "needs the configuration of", config=tmp_path)
    save_file({"nothing": torch.zeros(1)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "could not be loaded", config=tiny_pipeline_folder)
