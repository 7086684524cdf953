"""The numbers of agentsd-eval, each against a closed form, brute force in float64 or another library."""

import io
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from agentsd.cli.evaluate import main
from agentsd.demo.checker import AttributeChecker
from agentsd.demo.scenes import held_out_prompts
from agentsd.evaluation import metrics
from agentsd.evaluation.columns import Column
from agentsd.evaluation.metrics import Estimate, Statistics, frechet, frechet_distance, kernel, resamples
from agentsd.evaluation.networks import (
    Network,
    Weights,
    load_checker_distance,
    load_clip,
    load_lpips,
    load_network,
    state_hash,
)
from agentsd.evaluation.protocols import Reference, Scores, reference_scenes
from agentsd.evaluation.report import verdict
from agentsd.evaluation.scorer import Scorer
from agentsd.evaluation.scoring import described, score

pytest.importorskip("torch_fidelity")
pytest.importorskip("torchmetrics")
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def features(count: int, size: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixed / size**0.5 + shift


def with_moments(mean: np.ndarray, covariance: np.ndarray, count: int = 200) -> Tensor:
    """Features whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(5).standard_normal((count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False)).T)
    return torch.from_numpy(x @ np.linalg.cholesky(covariance).T + mean)


def test_two_gaussians_give_the_closed_form() -> None:
    first, second = np.array([0.5, 1.0, 2.0, 4.0]), np.array([1.0, 3.0, 0.2, 4.5])
    means = np.array([1.0, -2.0, 0.0, 3.0]), np.array([0.0, 1.0, 0.5, 3.0])
    expected = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    covariances = [turn @ np.diag(values) @ turn.T for values in (first, second)]
    x, y = (
        with_moments(mean, cov) for mean, cov in zip((means[0] @ turn.T, means[1] @ turn.T), covariances, strict=True)
    )
    assert frechet_distance(x, Statistics.of(y)) == pytest.approx(expected, rel=1e-9)


def test_covariances_that_do_not_commute() -> None:
    a, b = (np.cov(features(50, 5, seed).numpy(), rowvar=False) for seed in (1, 2))
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values) @ vectors.T
    expected = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.linalg.eigvalsh(root @ b @ root)).sum()
    zero = np.zeros(5)
    found = frechet_distance(with_moments(zero, a), Statistics.of(with_moments(zero, b)))
    assert found == pytest.approx(expected, rel=1e-8)


def test_the_same_images_are_at_distance_0_in_any_order() -> None:
    x, other = features(120, 16, 3), features(90, 16, 4, 0.3)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    scale = frechet_distance(x, Statistics.of(other))
    assert abs(frechet_distance(x, Statistics.of(x))) < 1e-7 * scale
    assert frechet_distance(shuffled, Statistics.of(other)) == pytest.approx(scale, rel=1e-9)


@pytest.mark.parametrize(("count", "size"), [(60, 8), (20, 32)])
def test_a_resample_is_the_distance_of_the_images_drawn(count: int, size: int) -> None:
    x, reference = features(count, size, 1), Statistics.of(features(200, size, 2, 0.2))
    counts = resamples(count, 3)
    assert (counts.sum(1) == count).all()
    found = frechet(x, reference, counts, CPU)
    for row, value in zip(counts, found.resampled, strict=True):
        drawn = x[np.repeat(np.arange(count), row)]
        assert value == pytest.approx(frechet_distance(drawn, reference), rel=1e-6)
    assert found.value == frechet_distance(x, reference)


def brute_mmd(x: np.ndarray, y: np.ndarray, labels: np.ndarray | None = None) -> float:
    """Unbiased squared MMD with the cubic kernel; with `labels`, pairs of the same label are left out of x's."""
    labels = np.arange(len(x)) if labels is None else labels

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    own = np.mean([kernel(x[i], x[j]) for i in range(n) for j in range(n) if labels[i] != labels[j]])
    other = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return float(own) + other - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_by_brute_force() -> None:
    x, y = features(14, 5, 1), features(14, 5, 2, 0.4)
    counts = resamples(14, 4)
    found = kernel(x, y, counts, subsets=2, subset_size=14)
    assert found.value == pytest.approx(brute_mmd(x.numpy(), y.numpy()), rel=1e-9)
    drawn = []
    for row in counts:
        chosen = np.repeat(np.arange(14), row)
        drawn.append(brute_mmd(x.numpy()[chosen], y.numpy(), chosen))
    # The part of the reference alone is left out, the same in all.
    np.testing.assert_allclose(np.diff(found.resampled), np.diff(drawn), rtol=1e-9)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    counts = resamples(80, 400)
    held = []
    for _ in range(300):
        low, high = metrics.mean(rng.exponential(2.0, 80), counts).interval() or (0, 0)
        held.append(low <= 2.0 <= high)
    assert 0.88 <= np.mean(held) <= 0.99


def test_frechet_intervals_hold_the_value_of_other_images_of_the_same_number() -> None:
    reference = Statistics.of(features(3000, 6, 0, 0.3))
    counts = resamples(100, 100)
    pool = features(3000, 6, 1).split(100)
    distances = [frechet_distance(part, reference) for part in pool]
    held = []
    for part in pool:
        low, high = frechet(part, reference, counts, CPU).interval() or (0, 0)
        held.append(low <= np.mean(distances) <= high)
    assert np.mean(held) >= 0.8


def test_differences_are_of_the_same_images() -> None:
    rng = np.random.default_rng(1)
    counts = resamples(200, 500)
    base = rng.normal(50, 10, 200)
    stock, better = metrics.mean(base, counts), metrics.mean(base + rng.normal(0.5, 0.5, 200), counts)
    low, high = better.minus(stock).interval() or (0, 0)
    assert 0 < low < 0.5 < high
    alone = better.interval()
    assert alone is not None
    assert high - low < (alone[1] - alone[0]) / 5
    assert better.minus(better).interval() == (0, 0)


def test_shares_medians_and_what_is_infinite() -> None:
    counts = resamples(4, 50)
    assert metrics.share([1, 0, 2, 1], [2, 1, 2, 1], counts).value == 4 / 6
    assert metrics.median([3.0, 1.0, 2.0, np.inf], counts).value == 2.5
    assert metrics.median([np.inf] * 4, counts).interval() is None
    row = np.array([[2, 0, 1, 1]])
    assert metrics.median([3.0, 1.0, 2.0, 5.0], row).resampled[0] == 3.0
    assert metrics.share([1, 0, 2, 1], [2, 1, 2, 1], row).resampled[0] == 5 / 7


def test_pairs_by_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    stock = torch.randint(0, 256, (3, 3, 200, 180), generator=generator, dtype=torch.uint8)
    images = (stock.int() + torch.randint(-9, 10, stock.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    error = ((images.double() - stock.double()) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(
        metrics.pair_distances("psnr", images, stock).double(), 10 * (255**2 / error).log10(), rtol=1e-5, atol=0
    )
    assert metrics.pair_distances("psnr", stock, stock).isinf().all()
    for name in ("ssim", "ms-ssim"):
        torch.testing.assert_close(metrics.pair_distances(name, stock, stock), torch.ones(3))
        assert (metrics.pair_distances(name, images, stock) < 0.9999).all()
    grey = [torch.full((1, 3, 32, 32), value, dtype=torch.uint8) for value in (100, 140)]
    a, b, c = 100 / 255, 140 / 255, 0.01**2
    expected = (2 * a * b + c) / (a * a + b * b + c)
    assert metrics.pair_distances("ssim", *grey).item() == pytest.approx(expected, abs=1e-4)


def test_precision_and_recall_of_sets_that_are_the_same_or_apart() -> None:
    x = features(40, 6, 1)
    assert metrics.precision_recall(x, x.clone(), 3) == (1, 1)
    assert metrics.precision_recall(x, x + 1000, 3) == (0, 0)
    inside = x[:5]
    precision, recall = metrics.precision_recall(inside, x, 3)
    assert precision == 1
    assert recall < 1


def test_inception_score_of_sure_and_unsure_classes() -> None:
    sure = torch.eye(10).repeat(10, 1) * 100
    assert metrics.inception_score(sure, 1) == pytest.approx(10, rel=1e-6)
    assert metrics.inception_score(torch.zeros(100, 10), 1) == pytest.approx(1)


# Networks


def test_checker_distance_is_lpips_formula() -> None:
    distance = load_checker_distance(CPU)
    stock = torch.randint(0, 256, (2, 3, 128, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = stock.flip(3)
    model = AttributeChecker.load().double()
    x, y = images.double() / 255 - 0.5, stock.double() / 255 - 0.5
    expected = torch.zeros(2, dtype=torch.float64)
    for block in range(5):
        for layer in range(3):
            x, y = model.trunk[3 * block + layer](x), model.trunk[3 * block + layer](y)
        for place in np.ndindex(*x.shape[2:]):
            a, b = x[(..., *place)], y[(..., *place)]
            a, b = a / a.norm(dim=1, keepdim=True).clamp_min(1e-12), b / b.norm(dim=1, keepdim=True).clamp_min(1e-12)
            expected += ((a - b) ** 2).sum(1) / (x.shape[2] * x.shape[3])
    torch.testing.assert_close(distance(images, stock).double(), expected.detach(), rtol=1e-3, atol=0)
    assert (distance(stock, stock) == 0).all()


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights in a folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from conftest import build_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**common, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = CLIPConfig(
        text_config=text, vision_config={**common, "image_size": 32, "patch_size": 8}, projection_dim=12
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_image_and_prompt(tiny_clip: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    prompts = ["a red ring", "a star", "a long prompt that goes on and on beyond all sixteen tokens"]
    found = load_clip(str(tiny_clip), CPU)(images, prompts)
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip).double(), CLIPTokenizer.from_pretrained(tiny_clip)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]
    pixels = (images.double() / 255 - mean) / std
    expected = []
    model.requires_grad_(False)
    for image, prompt in zip(pixels, prompts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=16).input_ids
        text = model.text_projection(model.text_model(ids).pooler_output)[0]
        seen = model.visual_projection(model.vision_model(image[None]).pooler_output)[0]
        expected.append(max(0.0, 100 * float(text @ seen / text.norm() / seen.norm())))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-3)
    assert min(expected) < max(expected)


def test_dinov2_features_are_the_class_token(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=4)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        Dinov2Model(config).save_pretrained(tmp_path)
    network = load_network("dinov2", Weights(dinov2=str(tmp_path)), "", CPU)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    model = Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model((images / 255 - mean) / std).last_hidden_state[:, 0]
        found, logits = network.extract(images)
    torch.testing.assert_close(found, expected)
    assert (network.size, logits) == (16, None)
    assert network.sha256 == state_hash(model)


def test_lpips_takes_its_networks_weights_from_a_file(tmp_path: Path) -> None:
    from torchmetrics.functional.image.lpips import _NoTrainLpips
    from torchvision.models import squeezenet1_1

    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = squeezenet1_1(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "squeeze.pth")
    before = torch.hub.get_dir()
    distance = load_lpips("squeeze", tmp_path / "squeeze.pth", CPU)
    assert torch.hub.get_dir() == before
    expected = _NoTrainLpips(net="squeeze", pnet_rand=True)
    layers = [layer for part in expected.net.slices for layer in part]
    for layer, trained in zip(layers, backbone.features, strict=True):
        layer.load_state_dict(trained.state_dict())
    stock = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = stock.flip(2)
    with torch.no_grad():
        wanted = expected(images / 255, stock / 255, normalize=True).flatten()
        torch.testing.assert_close(distance(images, stock), wanted)
        assert distance(images[:1], stock[:1]).shape == (1,)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FID's Inception with random weights, its batch norms calibrated: the file that both packages would download."""
    from torch import nn
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        net = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
            if isinstance(layer, nn.BatchNorm2d):
                layer.train()
        with torch.no_grad():
            net(torch.randint(0, 256, (4, 3, 75, 75), dtype=torch.uint8))
    file = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(net.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of four pictures."""
    found = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("pictures")
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn(4, 3, 6, 6, generator=generator) * 50 + 110 + 20 * seed
        smooth = torch.nn.functional.interpolate(coarse, size=(96, 96), mode="bicubic").clamp(0, 255).to(torch.uint8)
        for index, picture in enumerate(smooth):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
        found.append(folder)
    return found[0], found[1]


@pytest.mark.slow
def test_fid_is_that_of_torch_fidelitys_own_command(
    inception_weights: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_fidelity.fidelity import main as fidelity

    first, second = map(str, folders)
    weights = ["--feature-extractor-weights-path", str(inception_weights)]
    options = ["--cpu", "--fid", "--json", "--silent", "--save-cpu-ram", "--no-cache", "--batch-size", "3"]
    monkeypatch.setattr(sys, "argv", ["fidelity", "--input1", first, "--input2", second, *weights, *options])
    stream = io.StringIO()
    with redirect_stdout(stream):
        fidelity()
    expected = json.loads(stream.getvalue())["frechet_inception_distance"]
    done = main(
        [
            *("score", "--images", f"mine={first}", "--reference", second, "--features", "inception", "--pairs"),
            *("--inception-weights", str(inception_weights), "--allow-singular", "--bootstrap", "1", "--quiet"),
            *("--device", "cpu", "--output", str(tmp_path), "--cache", str(tmp_path / "cache")),
        ]
    )
    assert done == 0
    found = json.loads((tmp_path / "results.json").read_text())["methods"][0]["scores"]["inception_frechet"]["value"]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_statistics_are_those_of_pytorch_fids_own_command(
    inception_weights: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("pytorch_fid")
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "pt_inception-2015-12-05-6726825d.pth").symlink_to(inception_weights)
    command = ["-m", "pytorch_fid", "--save-stats", "--device", "cpu", "--num-workers", "0", "--batch-size", "3"]
    subprocess.run(
        [sys.executable, *command, str(folders[0]), str(tmp_path / "stats.npz")],
        check=True,
        capture_output=True,
        env={"TORCH_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    network = load_network("pytorch-fid", Weights(inception=inception_weights), "", CPU)
    scorer = Scorer(Scores(), Weights(), CPU, tmp_path / "cache", quiet=True)
    found = scorer.reference(network, Reference("images"), folders[0])
    expected = np.load(tmp_path / "stats.npz")
    scale = expected["sigma"].diagonal().max()
    np.testing.assert_allclose(found.mean, expected["mu"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.covariance, expected["sigma"], rtol=1e-4, atol=1e-5 * scale)


# Scores of folders


Pictures = Callable[..., Path]


@pytest.fixture
def picture_folder(tmp_path: Path) -> Pictures:
    """Write pictures: the embedded model's scenes, moved by `shift` grey levels."""

    def write(name: str, count: int = 12, size: int = 64, shift: int = 0) -> Path:
        from agentsd.demo import scenes

        images, _ = scenes.render(reference_scenes(Reference("scenes", count)), size, seed=3)
        folder = tmp_path / name
        folder.mkdir()
        for index, image in enumerate((images * 255).round().int()):
            picture = (image + shift).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(picture).save(folder / f"{index:02d}.png")
        return folder

    return write


def scored(tmp_path: Path, *options: object) -> dict[str, Any]:
    common = [
        "--output",
        tmp_path / "out",
        "--cache",
        tmp_path / "cache",
        "--bootstrap",
        50,
        "--quiet",
        "--device",
        "cpu",
    ]
    assert main([str(word) for word in ("score", *options, *common)]) == 0
    return dict(json.loads((tmp_path / "out" / "results.json").read_text()))


def test_identical_folders_and_order_and_batch_do_not_matter(picture_folder: Pictures, tmp_path: Path) -> None:
    stock, near, far = picture_folder("a"), picture_folder("b", shift=2), picture_folder("c", shift=40)
    result = scored(
        tmp_path,
        *("--images", f"stock={stock}", "--images", f"near={near}", "--images", f"far={far}"),
        *("--features", "checker", "--reference", stock, "--pairs", "psnr", "ssim", "checker", "--allow-singular"),
    )
    distances = {row["method"]: row["scores"]["checker_frechet"]["value"] for row in result["methods"]}
    assert abs(distances["stock"]) < 1e-5 * distances["far"]
    assert distances["near"] < distances["far"]
    near_scores = result["methods"][1]["scores"]
    assert near_scores["psnr"]["value"] == pytest.approx(20 * np.log10(255 / 2), abs=0.5)
    assert "psnr" not in result["methods"][0]["scores"]
    for number, path in enumerate(sorted(far.iterdir(), reverse=True)):
        path.rename(far / f"x{number}.png")
    scorer = Scorer(
        Scores(features=("checker",), bootstrap=2, allow_singular=True), Weights(), CPU, tmp_path / "other", 5, True
    )
    again = score({"far": sorted(far.iterdir())}, scorer, reference=Reference("images"), where=stock)
    assert again["methods"][0]["scores"]["checker_frechet"]["value"] == pytest.approx(distances["far"], rel=1e-5)


def test_features_are_cached_by_their_content(picture_folder: Pictures, tmp_path: Path) -> None:
    stock, other = picture_folder("a"), picture_folder("b", shift=9)
    calls: list[int] = []
    scores = Scores(features=("checker",), bootstrap=2, allow_singular=True)

    def run() -> float:
        scorer = Scorer(scores, Weights(), CPU, tmp_path / "cache", quiet=True)
        true = scorer.networks[0]
        counting = lambda images: (calls.append(len(images)), true.extract(images))[1]  # noqa: E731
        scorer.networks = [Network(true.name, true.size, true.sha256, counting)]
        found = score({"mine": sorted(other.iterdir())}, scorer, reference=Reference("images"), where=stock)
        return float(found["methods"][0]["scores"]["checker_frechet"]["value"])

    first = run()
    assert sum(calls) == 24
    assert run() == first
    assert sum(calls) == 24
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert run() == first
    assert sum(calls) == 48
    Image.new("RGB", (64, 64)).save(other / "00.png")
    assert run() != first
    assert sum(calls) == 60


def test_attributes_are_those_of_the_models_card(picture_folder: Pictures, tmp_path: Path) -> None:
    folder = picture_folder("a", 10, 128)
    prompts = held_out_prompts(10)
    scorer = Scorer(Scores(adherence=("attributes",), bootstrap=10), Weights(), CPU, tmp_path, 3, True)
    found = score({"stock": sorted(folder.iterdir())}, scorer, prompts=prompts)["methods"][0]["scores"]
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(folder.iterdir())])
    measure = runpy.run_path(str(ROOT / "scripts/training/accuracy.py"))["measure"]
    expected = measure(images.permute(0, 3, 1, 2).float() / 255, prompts, AttributeChecker.load())
    assert {key.removeprefix("attributes_"): row["value"] / 100 for key, row in found.items()} == pytest.approx(
        expected
    )


def test_noise_is_called_noise() -> None:
    column = Column("x", "x", "less", 1, "")
    rng = np.random.default_rng(0)
    spread = rng.normal(0, 1, 500)
    stock = Estimate(10.0, 10 + spread)
    for shift, noise, said in ((0.1, True, "≈"), (-3.0, False, "better"), (3.0, False, "worse")):
        other = Estimate(10 + shift, 10 + shift + spread + rng.normal(0, 0.5, 500))
        found = described(other, stock)
        assert found["difference"]["noise"] is noise
        assert verdict(column, found) == said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_and_gpu_agree(picture_folder: Pictures, inception_weights: Path, tmp_path: Path) -> None:
    stock, other = picture_folder("a", 70), picture_folder("b", 70, shift=20)
    values = []
    for device in ("cpu", "cuda"):
        scores = Scores(features=("checker", "inception"), bootstrap=3, allow_singular=True)
        scorer = Scorer(
            scores, Weights(inception=inception_weights), torch.device(device), tmp_path / device, quiet=True
        )
        found = score({"mine": sorted(other.iterdir())}, scorer, reference=Reference("images"), where=stock)
        values.append(found["methods"][0]["scores"])
    for key in ("checker_frechet", "inception_frechet"):
        assert values[1][key]["value"] == pytest.approx(values[0][key]["value"], rel=1e-3)
        assert values[1][key]["interval"] == pytest.approx(values[0][key]["interval"], rel=1e-3)
