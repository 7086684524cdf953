"""agentsd-eval: protocols that say everything, images that are the same bits whoever makes them, reports."""

import errno
import hashlib
import html.parser
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import agentsd
from agentsd import results
from agentsd.cli.evaluate import main
from agentsd.evaluation import figures, generation, pictures, protocols, report
from agentsd.evaluation.networks import Weights, load_clip, load_network
from agentsd.evaluation.pictures import is_finished, label
from agentsd.evaluation.timing import Timing, speeds, timings
from agentsd.methods import method
from agentsd.results import write_image

ROOT = Path(__file__).resolve().parents[2]
PEERS = {"tomesd": "tomesd", "deepcache": "DeepCache", "tgate": "tgate"}
METHODS = ["stock", "paper:ratio=0.4", "fast:stride=2"]
PEER_METHODS = {"tomesd": "tomesd", "deepcache": "deepcache", "tgate": "tgate:gate_step=2"}
METHODS += [PEER_METHODS[name] for name, package in PEERS.items() if importlib.util.find_spec(package)]
scoring = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch_fidelity", "torchmetrics", "matplotlib")),
    reason="needs agentsd[eval]",
)
Run = Callable[..., int]


@pytest.fixture
def protocol(tmp_path: Path, tiny_pipeline_folder: Path) -> Path:
    """A protocol in a file: eight images of the tiny pipeline, in batches of three."""
    values = {
        "description": "a test",
        "model": str(tiny_pipeline_folder),
        "prompts": {"source": "scenes", "number": 8},
        "seed": 5,
        "steps": 3,
        "guidance": 2.0,
        "dtype": "float32",
        "batch": 3,
        "methods": METHODS,
        "reference": {"source": "scenes", "number": 80},
        "scores": {
            "features": ["checker"],
            "pairs": ["psnr", "ssim", "checker"],
            "adherence": ["attributes"],
            "kid_subset_size": 8,
            "bootstrap": 40,
            "allow_singular": True,
        },
    }
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def evaluate(tmp_path: Path, protocol: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a subcommand on the protocol, in a folder named by its first argument."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, output: str, *options: object) -> int:
        words = [command, "--protocol", protocol, "--output", output, "--device", "cpu", "--quiet", *options]
        if command == "run":
            words += ["--cache", tmp_path / "cache"]
        return main([str(word) for word in words])

    return run


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every image of a run."""
    paths = sorted((folder / "images").rglob("*"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.is_file()}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# Protocols


@pytest.mark.parametrize("name", protocols.names())
def test_the_protocols_of_the_package_are_sound(name: str) -> None:
    protocol = protocols.load(name)
    assert protocols.from_dict(protocol.to_dict()) == protocol
    assert [method(text).text for text in protocol.methods] == list(protocol.methods)
    assert protocols.load(protocols._path(name)) == protocol
    assert len({protocols.load(other).sha256 for other in protocols.names()}) == len(protocols.names())


def test_the_papers_protocol_is_the_papers() -> None:
    pytest.importorskip("torchvision")
    paper = protocols.load("paper")
    prompts = protocols.prompts(paper)
    assert len(prompts) == 2000
    assert set(Counter(prompts).values()) == {2}
    assert prompts[1] == prompts[1001] == "A high quality photograph of a goldfish."
    assert (paper.sampler, paper.steps, paper.guidance, paper.width, paper.height) == ("plms", 50, 7.5, 512, 512)
    ratios = [f"0.{i}" for i in range(1, 6)]
    assert paper.methods == ("stock", *(f"{name}:ratio={ratio}" for name in ("tomesd", "paper") for ratio in ratios))
    assert paper.reference.number == 50000
    tomesd = protocols.load("tomesd")
    assert (tomesd.reference.number, tomesd.reference.per_class) == (5000, 5)
    assert tomesd.replace(name="paper", description=paper.description, reference=paper.reference) == paper


def test_demo_is_measured_at_every_ratio_beside_every_peer() -> None:
    demo = protocols.load("demo")
    ratios = [f"0.{i}" for i in range(1, 8)]
    wanted = {f"{name}:ratio={ratio}" for name in ("tomesd", "paper") for ratio in ratios}
    assert wanted | {"stock", "faithful", "fast", "tgate"} <= set(demo.methods)
    assert {text.partition(":")[0] for text in demo.methods} == {"stock", *agentsd.AgentSDConfig.presets(), *PEERS}
    assert demo.prompts.number >= 512


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stepps": 3}, "a protocol has no field 'stepps'; its fields are name, description"),
        ({"prompts": {"source": "scenes", "number": 8, "sead": 1}}, "prompts has no field 'sead'"),
        ({"prompts": {"number": 8}}, "prompts needs the field 'source'"),
        ({"prompts": {"source": "books", "number": 8}}, "prompts.source is 'books'; it must be one of scenes, "),
        ({"prompts": {"source": "captions", "number": 8, "template": "a"}}, "with {} in it once"),
        ({"scores": {"features": ["inseption"]}}, "scores.features is 'inseption'"),
        ({"scores": {"pears": []}}, "scores has no field 'pears'"),
        ({"scores": {"bootstrap": 0}}, "scores.bootstrap is 0; it must be a whole number from 1"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": True}, "steps is True"),
        ({"guidance": "much"}, "guidance is 'much'"),
        ({"methods": ["paper"]}, "its first must be stock"),
        ({"methods": "stock"}, "methods is 'stock'; it must be a list of names"),
        ({"sampler": "dimm"}, "sampler is 'dimm'; it must be null or one of ddim"),
        ({"reference": {"source": "none"}}, "without a reference there is nothing to compare with"),
        ({"reference": {"source": "scenes"}}, "rendered scenes need a number"),
        ({"base": "papper"}, "base: protocol is 'papper'; it must be one of ablation"),
        ({"base": "small.yaml"}, "which builds on this file"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
    ],
)
def test_what_a_protocol_cannot_say(
    change: dict[str, Any], words: str, protocol: Path, evaluate: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol.write_text(yaml.safe_dump(yaml.safe_load(protocol.read_text()) | change))
    assert evaluate("generate", "out") == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "small.yaml" in error
    assert len(error.splitlines()) == 1
    assert not Path("out").exists()


def test_a_protocol_builds_on_another(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: paper\nsteps: 7\nprompts: {number: 3}\nscores: {pairs: []}\n")
    mine, paper = protocols.load(tmp_path / "mine.yaml"), protocols.load("paper")
    assert (mine.name, mine.steps, mine.prompts.number) == ("mine", 7, 3)
    assert (mine.prompts.template, mine.scores.features) == (paper.prompts.template, paper.scores.features)
    (tmp_path / "mine.yaml").write_text("base: paper\nreference: {source: none}\nscores: {features: []}\n")
    assert protocols.load(tmp_path / "mine.yaml").reference == protocols.Reference()
    (tmp_path / "other.yaml").write_text("[1")
    with pytest.raises(ValueError, match=r"other\.yaml is not a YAML file"):
        protocols.load(tmp_path / "other.yaml")


def test_captions_of_every_form(tmp_path: Path) -> None:
    rows = [(7, 3, "second \n image"), (5, 2, "later"), (2, 2, " first"), (9, 3, "no")]
    coco = {"annotations": [{"id": i, "image_id": image, "caption": text} for i, image, text in rows]}
    (tmp_path / "a.json").write_text(json.dumps(coco))
    (tmp_path / "b.tsv").write_text("Prompt\tCategory\na cat\tAnimals\na dog, big\tAnimals\n")
    (tmp_path / "c.txt").write_text("\ufeffone\n\n two \n")
    (tmp_path / "d.json").write_text("{}")
    (tmp_path / "e.txt").write_text("\n")
    assert protocols.read_captions(tmp_path / "a.json") == ["first", "second image"]
    assert protocols.read_captions(tmp_path / "b.tsv") == ["a cat", "a dog, big"]
    assert protocols.read_captions(tmp_path / "c.txt") == ["one", "two"]
    for name, words in (("d.json", "is not a file of captions"), ("e.txt", "holds no caption")):
        with pytest.raises(ValueError, match=words):
            protocols.read_captions(tmp_path / name)
    coco_protocol = protocols.load("coco")
    assert protocols.prompts(coco_protocol, tmp_path / "c.txt")[:3] == ["one", "two", "one"]
    with pytest.raises(ValueError, match="--captions"):
        protocols.prompts(coco_protocol)


def test_scenes_of_the_reference_are_not_those_of_the_prompts() -> None:
    from agentsd.demo.scenes import parse

    demo = protocols.load("demo")
    asked = [parse(prompt) for prompt in protocols.prompts(demo)]
    rendered = protocols.reference_scenes(demo.reference)
    assert len(rendered) == demo.reference.number
    assert all(scene.held_out for scene in rendered)
    assert sum(a == b for a, b in zip(asked, rendered, strict=False)) < 5


# Generation


@pytest.mark.slow
def test_images_are_the_pipelines_own(evaluate: Run, tmp_path: Path, protocol: Path, tiny_pipeline: Any) -> None:
    assert evaluate("generate", "out") == 0
    prompts = protocols.prompts(protocols.load(protocol))
    options = {"num_inference_steps": 3, "guidance_scale": 2.0}
    for name, prepare in (("stock", agentsd.remove), ("paper-ratio=0.4", lambda p: agentsd.apply(p, ratio=0.4))):
        prepare(tiny_pipeline)
        for part in ([0, 1, 2], [6, 7]):
            generator = [torch.Generator().manual_seed(5 + index) for index in part]
            made = tiny_pipeline([prompts[index] for index in part], generator=generator, **options).images
            for index, image in zip(part, made, strict=True):
                np.testing.assert_array_equal(
                    pixels(tmp_path / f"out/images/{name}/{index:05d}.png"), np.asarray(image)
                )
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["prompts"] == prompts
    assert list(record["methods"]) == METHODS
    assert record["sessions"][0]["command"][:2] == ["agentsd-eval", "generate"]
    made = timings(tmp_path / "out")
    assert Counter(timing.method for timing in made) == dict.fromkeys(METHODS, 3)
    assert [timing.warm for timing in made if timing.method == "stock"] == [False, True, True]


def test_a_part_of_the_images_is_the_same_images(evaluate: Run, tmp_path: Path) -> None:
    options = ("--method", "stock", "--method", "tomesd") if "tomesd" in METHODS else ("--method", "stock")
    assert evaluate("generate", "whole", *options) == 0
    assert evaluate("generate", "grown", *options, "--limit", 2) == 0
    small = digests(tmp_path / "grown")
    assert evaluate("generate", "grown", *options, "--limit", 5) == 0
    assert small.items() < digests(tmp_path / "grown").items() < digests(tmp_path / "whole").items()
    assert evaluate("generate", "grown", *options) == 0
    assert digests(tmp_path / "grown") == digests(tmp_path / "whole")


def test_what_a_kill_leaves_is_made_whole(evaluate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--method", "stock", "--method", "paper:ratio=0.4")
    assert evaluate("generate", "out", *options) == 0
    out = tmp_path / "out"
    whole = digests(out)
    names = sorted(whole)
    cut, flipped, foreign, absent, empty = (out / names[i] for i in (0, 4, 9, 12, 15))
    cut.write_bytes(cut.read_bytes()[:-20])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    write_image(foreign, Image.new("RGB", (64, 64)), text=label({"index": 9}))
    absent.unlink()
    empty.write_bytes(b"")
    cut.with_name(f".{cut.name}.tmp").write_bytes(b"half")
    with (out / "timings-0.jsonl").open("a") as log:
        log.write('{"method": "stock", "ind')
    kept = [out / name for name in names if out / name not in (cut, flipped, foreign, absent, empty)]
    times = {path: path.stat().st_mtime_ns for path in kept}
    before = len(timings(out))
    assert evaluate("generate", "out", *options) == 0
    assert digests(out) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    assert len(timings(out)) > before
    monkeypatch.setattr(generation, "prepared", lambda *_: pytest.fail("nothing is left to make"))
    assert evaluate("generate", "out", *options) == 0


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 5, 12])
def test_an_interrupted_run_goes_on(
    moment: int, evaluate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--method", "stock", "--method", "paper:ratio=0.4")
    assert evaluate("generate", "whole", *options) == 0
    true, calls = os.replace, 0

    def interrupted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt
        true(*args)

    monkeypatch.setattr(results.os, "replace", interrupted)
    assert evaluate("generate", "out", *options) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert evaluate("generate", "out", *options) == 0
    assert digests(tmp_path / "out").items() >= digests(tmp_path / "whole").items()
    finished = [name for name in digests(tmp_path / "out") if "/." not in name]
    assert finished == list(digests(tmp_path / "whole"))


def test_a_full_disk_loses_nothing(
    evaluate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--method", "stock")
    true, room = os.fsync, 5

    def full(file: int) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        true(file)

    with monkeypatch.context() as patch:
        patch.setattr(results.os, "fsync", full)
        assert evaluate("generate", "out", *options) == 2
    assert capsys.readouterr().err.strip() == (
        "agentsd-eval: error: out/images/stock/00004.png: No space left on device"
    )
    there = digests(tmp_path / "out")
    assert sorted(there) == [f"images/stock/0000{i}.png" for i in range(4)]
    assert evaluate("generate", "out", *options) == 0
    assert there.items() < digests(tmp_path / "out").items()
    assert len(digests(tmp_path / "out")) == 8


def test_out_of_memory_halves_the_batch(
    evaluate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true, sizes = generation.prepared, []

    def small(most: int) -> Callable[..., Any]:
        def make(pipe: Any, wanted: Any) -> Any:
            call = true(pipe, wanted)

            def draw(prompts: list[str], **options: Any) -> Any:
                sizes.append(len(prompts))
                if len(prompts) > most:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
                return call(prompts, **options)

            return draw

        return make

    monkeypatch.setattr(generation, "prepared", small(1))
    assert evaluate("generate", "out", "--method", "stock") == 0
    assert sizes == [3, 1, 1, 1, 1, 1, 1, 1, 1]
    assert len(digests(tmp_path / "out")) == 8
    assert [len(timing.indices) for timing in timings(tmp_path / "out")] == [1] * 8
    monkeypatch.setattr(generation, "prepared", small(0))
    assert evaluate("generate", "none", "--method", "stock") == 2
    assert "out of memory with one image at a time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "4"], "holds a run whose steps is 3, not 4; name another --output for this one"),
        (["--dtype", "bfloat16"], "whose dtype is 'float32', not 'bfloat16'"),
        (["--batch-size", "2"], "whose batch is 3, not 2"),
        (["--threads", "2"], "whose threads is 1, not 2"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    options: list[str], words: str, evaluate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("generate", "out", "--method", "stock", "--limit", 1) == 0
    there = digests(tmp_path / "out")
    assert evaluate("generate", "out", "--method", "stock", *options) == 2
    assert words in capsys.readouterr().err
    assert digests(tmp_path / "out") == there


def test_other_prompts_are_another_run(evaluate: Run, protocol: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("generate", "out", "--method", "stock", "--limit", 1) == 0
    values = yaml.safe_load(protocol.read_text())
    values["prompts"]["seed"] = 9
    protocol.write_text(yaml.safe_dump(values))
    assert evaluate("generate", "out", "--method", "stock") == 2
    assert "whose prompts are others" in capsys.readouterr().err


def command(processes: int, output: Path, protocol: Path) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = ["generate", "--protocol", protocol, "--output", output, "--device", "cpu", "--quiet"]
    return [sys.executable, *launch * (processes > 1), "-m", "agentsd.cli.evaluate", *map(str, words)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_bits_after_a_kill(
    evaluate: Run, protocol: Path, tmp_path: Path
) -> None:
    # The other processes have the default of min_tokens.
    names = ["stock", "paper:ratio=0.4,min_tokens=1", *(m for m in METHODS if m == "tomesd")]
    protocol.write_text(yaml.safe_dump(yaml.safe_load(protocol.read_text()) | {"methods": names}))
    assert evaluate("generate", "alone") == 0
    out = tmp_path / "out"
    with subprocess.Popen(command(1, out, protocol), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None and len(list(out.glob("images/*/*.png"))) < 7:
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
    assert 0 < len(digests(out)) < len(digests(tmp_path / "alone"))
    done = subprocess.run(command(2, out, protocol), cwd=ROOT, env=ENVIRONMENT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    finished = {name: value for name, value in digests(out).items() if "/." not in name}
    assert finished == digests(tmp_path / "alone")
    assert sorted(path.name for path in out.glob("timings-*")) == ["timings-0.jsonl", "timings-1.jsonl"]
    sessions = json.loads((out / "run.json").read_text())["sessions"]
    assert [session["processes"] for session in sessions] == [1, 2]


# Scores and reports


@pytest.mark.slow
@scoring
def test_run_generates_scores_and_reports(evaluate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("run", "out") == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["method"] for row in result["methods"]] == METHODS
    stock, paper = result["methods"][:2]
    assert stock["time"]["speed"] == 1
    assert paper["time"]["seconds"] > 0
    assert paper["settings"] == method("paper:ratio=0.4").settings
    assert paper["settings_sha256"] == method("paper:ratio=0.4").sha256 != method("paper:ratio=0.5").sha256
    assert set(paper["scores"]) == {column["key"] for column in result["columns"]}
    images = [
        [pixels(tmp_path / f"out/images/{name}/{index:05d}.png").astype(float) for index in range(8)]
        for name in ("paper-ratio=0.4", "stock")
    ]
    psnr = [20 * np.log10(255 / np.sqrt(np.mean((a - b) ** 2))) for a, b in zip(*images, strict=True)]
    assert paper["scores"]["psnr"]["value"] == pytest.approx(np.median(psnr), rel=1e-4)
    assert paper["scores"]["psnr_worst"]["value"] == pytest.approx(min(psnr), rel=1e-4)
    markdown = (tmp_path / "out/report.md").read_text()
    assert report.table(result) in markdown
    assert report.table(result) in printed
    assert paper["settings_sha256"] in markdown
    assert result["provenance"]["images"]["steps"] == 3
    assert "agentsd-eval run --protocol" in markdown
    assert main(["report", str(tmp_path / "out"), "--table", "--columns", "checker_frechet"]) == 0
    assert "| method | s/image | × stock | Fréchet distance (checker) ↓ |" in capsys.readouterr().out
    text = tmp_path / "text.md"
    text.write_text("a\n<!-- agentsd-eval out/results.json psnr ssim -->\nold\n<!-- /agentsd-eval -->\nb\n")
    assert main(["report", "--into", "text.md"]) == 0
    lines = text.read_text().splitlines()
    assert "| method | s/image | × stock | PSNR, dB ↑ | SSIM ↑ |" in lines
    assert any(line.startswith("agentsd-eval run --protocol") for line in lines)
    assert f"*{result['title']}, 3 steps, float32, " in text.read_text()
    assert (lines[0], lines[-1]) == ("a", "b")
    once = text.read_text()
    assert main(["report", "--into", "text.md"]) == 0
    assert text.read_text() == once
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("results.json", "report.md", "report.html")}
    assert main(["report", str(tmp_path / "out")]) == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    assert main(["score", "out", "--quiet", "--cache", "cache", "--device", "cpu"]) == 0
    again = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["scores"] for row in again["methods"]] == [row["scores"] for row in result["methods"]]


def test_the_tables_of_the_texts_are_those_of_the_results() -> None:
    text = ROOT / "docs" / "benchmarks.md"
    assert report.renewed(text) == text.read_text(encoding="utf-8")


def test_what_has_no_table_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.md").write_text("nothing")
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "place.md").write_text("<!-- agentsd-eval other.json -->\n<!-- /agentsd-eval -->")
    for options, words in (
        (["--into", "text.md"], "text.md has no lines <!-- agentsd-eval -->"),
        (["--into", "place.md"], "other.json is not a file of results"),
        (["other.json", "--table"], "other.json is not a file of results"),
        ([], "report needs RESULTS, or --into with documents"),
    ):
        assert main(["report", *(str(tmp_path / word) if "." in word else word for word in options)]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error
        assert len(error.splitlines()) == 1
    assert (tmp_path / "text.md").read_text() == "nothing"


class Tags(html.parser.HTMLParser):
    """Checks that tags match, and collects what a page refers to."""

    VOID = ("meta", "img", "br", "link", "path", "use")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: Counter[str] = Counter()
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.slow
@scoring
def test_the_page_is_whole_and_opens_offline(evaluate: Run, tmp_path: Path) -> None:
    assert evaluate("run", "out", "--limit", 4) == 0
    text = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert all(reference.startswith(("data:image/jpeg;base64,", "#")) for reference in tags.references)
    assert "@import" not in text
    assert "url(http" not in text
    others = len(METHODS) - 1
    assert tags.counts["svg"] == 6
    assert tags.counts["details"] == others
    assert tags.counts["img"] == 2 * 4 * others
    assert tags.counts["tr"] == 1 + len(METHODS)
    assert "currentColor" in text
    assert figures.INK not in text
    assert "prefers-color-scheme: dark" in text
    assert "4 images are too few to trust the intervals" in text
    assert "4 images are fewer than the 64 features of checker" in text


def test_words_of_a_page_are_escaped(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", Image.new("RGB", (8, 8)))
    shown = {"index": 0, "file": "a.png", "stock_file": "a.png", "prompt": "<b>&\"'", "psnr": None}
    rows = [{"method": name, "images": 1, "scores": {}, "pictures": [shown]} for name in ("stock", "<i>")]
    result = {"title": "<script>", "description": "a & b", "columns": [], "methods": rows, "notes": ["<p>"]}
    page = report.page(result | {"protocol": None, "provenance": {"x": "<u>"}}, tmp_path)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not {"script", "b", "i", "u"} & set(tags.counts)
    assert "&lt;b&gt;&amp;" in page


def test_pareto_front_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    for less in (True, False):
        points = [(float(a), float(b)) for a, b in rng.integers(0, 8, (25, 2))]
        sign = -1 if less else 1

        def beaten(p: tuple[float, float], points: list[tuple[float, float]] = points, sign: int = sign) -> bool:
            return any(q[0] >= p[0] and sign * q[1] >= sign * p[1] and q != p for q in points)

        front = figures.pareto(points, less)
        assert {points[i] for i in front} == {p for p in points if not beaten(p)}
        assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_speeds_are_medians_of_the_same_batches() -> None:
    def timing(name: str, batch: int, seconds: float, warm: bool = True) -> Timing:
        return Timing(name, (batch,), seconds, None, warm)

    found = [timing("stock", i, s) for i, s in enumerate([2.0, 4.0, 8.0])]
    found += [timing("fast", i, s) for i, s in enumerate([1.0, 2.0, 2.0])]
    found += [timing("stock", 9, 100.0, warm=False), timing("cold", 0, 5.0, warm=False)]
    result = speeds(found, ["stock", "fast", "cold", "none"], "stock")
    assert result["fast"]["speed"] == 2
    assert result["fast"]["seconds"] == 2
    assert result["stock"] == {"seconds": 4.0, "batches": 3, "speed": 1.0, "speed_interval": [1.0, 1.0]}
    low, high = result["fast"]["speed_interval"]
    assert 2 <= low <= high <= 4
    assert result["cold"]["seconds"] == 5
    assert "none" not in result


# Bad input


def damaged(folder: Path) -> dict[str, Any]:
    """Folders of which each has one thing wrong, and what is said of it."""

    def pictures(name: str, count: int = 4, size: int = 64, mode: str = "RGB") -> Path:
        (folder / name).mkdir()
        for index in range(count):
            Image.linear_gradient("L").resize((size, size)).convert(mode).save(folder / name / f"{index}.png")
        return folder / name

    good = pictures("good")
    (pictures("corrupt") / "2.png").write_bytes(b"\x89PNG no")
    Image.linear_gradient("L").resize((64, 64)).save(pictures("grey") / "1.png")
    Image.new("RGB", (32, 64)).save(pictures("sizes") / "3.png")
    np.savez(folder / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(folder / "nothing.npz", x=1)
    (folder / "text.npz").write_text("no")
    (folder / "weights.pth").write_text("no")
    torch.save({"a": torch.zeros(3)}, folder / "wrong.pth")
    pictures("fewer", 3)
    pictures("small", 4, 32)
    (folder / "empty").mkdir()
    singular = ["--features", "checker", "--allow-singular"]
    stock = ["--images", f"stock={good}"]
    return {
        "corrupt": ([*stock, "--images", f"x={folder}/corrupt"], "corrupt/2.png is not a picture that can be read"),
        "grey": ([*stock, "--images", f"x={folder}/grey"], "grey/1.png is a picture of mode L; it must be RGB"),
        "sizes": ([*stock, "--images", f"x={folder}/sizes"], "sizes/3.png has 32×64 pixels, "),
        "pairs of sizes": ([*stock, "--images", f"x={folder}/small"], "small/0.png has 32×32 pixels, its stock image"),
        "fewer": ([*stock, "--images", f"x={folder}/fewer"], "x has 3 images, stock 4; there must be as many of each"),
        "limit": ([*stock, "--limit", "5"], "good holds 4 pictures, fewer than --limit 5"),
        "empty": ([*stock, "--images", f"x={folder}/empty"], "empty holds no picture"),
        "missing": ([*stock, "--images", f"x={folder}/none"], "none is not a folder of pictures"),
        "name": (["--images", "good"], "--images is 'good'; it must be NAME=FOLDER"),
        "few": (
            [*stock, "--reference", good, "--features", "checker"],
            "4 images are too few for a Fréchet distance in 64",
        ),
        "statistics": (
            [*stock, "--reference", f"{folder}/other.npz", *singular],
            "other.npz is of 7 features; checker has 64",
        ),
        "no statistics": (
            [*stock, "--reference", f"{folder}/nothing.npz", *singular],
            "nothing.npz does not hold statistics",
        ),
        "no npz": ([*stock, "--reference", f"{folder}/text.npz", *singular], "text.npz does not hold statistics"),
        "absent npz": ([*stock, "--reference", f"{folder}/none.npz", *singular], "none.npz: No such file or directory"),
        "no reference": ([*stock, *singular], "--reference names a folder of pictures"),
        "reference": ([*stock, "--reference", f"{folder}/empty", *singular], "empty holds no picture"),
        "weights": (
            [*stock, "--reference", good, "--allow-singular", "--inception-weights", f"{folder}/weights.pth"],
            "weights.pth is not a file of weights",
        ),
        "other weights": (
            [*stock, "--reference", good, "--allow-singular", "--inception-weights", f"{folder}/wrong.pth"],
            "wrong.pth does not hold the weights of FID's Inception",
        ),
        "lpips": ([*stock, "--pairs", "lpips", "--lpips-weights", f"{folder}/none"], "--lpips-weights"),
        "features": ([*stock, "--features", "inseption"], "scores.features is 'inseption'"),
        "no run": ([f"{folder}/good"], "good holds no run: there is no run.json in it"),
        "neither": ([], "score needs the folder of a run, or --images"),
        "both": ([f"{folder}/good", *stock], "leave one of both out"),
    }


@scoring
@pytest.mark.parametrize("case", [
    "corrupt", "grey", "sizes", "pairs of sizes", "fewer", "limit", "empty", "missing", "name", "few", "statistics",
    "no statistics", "no npz", "absent npz", "no reference", "reference", "weights", "other weights", "lpips",
    "features", "no run", "neither", "both",
])  # fmt: skip
def test_bad_input_is_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, words = damaged(tmp_path)[case]
    common = ["--quiet", "--device", "cpu", "--bootstrap", "3", "--cache", str(tmp_path / "cache")]
    output = [] if case == "neither" else ["--output", str(tmp_path / "out")]
    assert main([str(word) for word in ("score", *options, *common, *output)]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--protocol", "papper"], "protocol is 'papper'; it must be one of ablation, "),
        (["--protocol", "none.yaml"], "none.yaml: No such file or directory"),
        (["--protocol", "paper"], "--model names it"),
        (["--protocol", "coco", "--model", "demo"], "--captions names"),
        (["--method", "nothing"], "method is 'nothing'"),
        (["--limit", "0"], "must be a whole number from 1, not '0'"),
        (["--output", "small.yaml/out"], "small.yaml/out"),
        (["--model", "missing"], "unknown model 'missing'"),
        (["--device", "cuda:9"], "cuda:9"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_options_are_one_sentence(
    options: list[str], words: str, evaluate: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("generate", "out", *options) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1


@scoring
def test_weights_that_are_not_there_are_one_sentence(
    evaluate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from urllib.error import URLError

    from torch_fidelity import feature_extractor_inceptionv3

    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", unreachable)
    assert evaluate("run", "out", "--features", "inception") == 2
    error = capsys.readouterr().err
    assert "the weights of FID's Inception is not on this machine and could not be downloaded" in error
    assert "--inception-weights names the file" in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="does not hold CLIP"):
        load_clip(str(tmp_path), torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"DINOv2 .* is not on this machine and could not be downloaded.*--dinov2 names"
    ):
        load_network("dinov2", Weights(), "./nowhere", torch.device("cpu"))


def test_a_peer_that_is_not_installed_is_left_out(
    evaluate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("agentsd.methods.version", lambda package: None)
    assert evaluate("generate", "out", "--limit", 1) == 0
    assert [path.name for path in (tmp_path / "out/images").iterdir()] != []
    assert not (tmp_path / "out/images/tomesd").exists()
    if "tomesd" in METHODS:
        assert "tomesd is left out: the package tomesd is not installed" in capsys.readouterr().err
    assert evaluate("generate", "other", "--limit", 1, "--method", "tomesd") == 2
    assert "needs the package tomesd: pip install 'agentsd[bench]'" in capsys.readouterr().err


def test_images_that_are_not_there_yet(evaluate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_fidelity")
    assert evaluate("generate", "out", "--method", "stock", "--limit", 4) == 0
    capsys.readouterr()
    assert main(["score", "out", "--limit", "8", "--quiet", "--cache", "cache", "--device", "cpu"]) == 2
    assert re.search(r"stock/0000[67]\.png is not there yet; generate makes it", capsys.readouterr().err)


def test_the_same_picture_makes_the_same_file(tmp_path: Path) -> None:
    picture, text = Image.linear_gradient("L").convert("RGB"), {"prompt": "ä “ring”", "index": 1}
    for name in "ab":
        write_image(tmp_path / f"{name}.png", picture, text=label(text))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert is_finished(tmp_path / "a.png", text)
    assert not is_finished(tmp_path / "a.png", text | {"index": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_pictures_of_each_class(tmp_path: Path) -> None:
    for name in ("n02/b.JPEG", "n02/a.JPEG", "n02/c.JPEG", "n01/z.JPEG", "n01/y.JPEG", "n01/.hidden.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("L" if "a" in path.stem else "RGB", (20, 10)).save(path, "JPEG")
    found = pictures.list_pictures(tmp_path, per_class=2)
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "n01/y.JPEG",
        "n01/z.JPEG",
        "n02/a.JPEG",
        "n02/b.JPEG",
    ]
    assert pictures.list_pictures(tmp_path, number=1) == [tmp_path / "n01/y.JPEG"]
    with pytest.raises(ValueError, match="holds 5 pictures; the protocol takes 6"):
        pictures.list_pictures(tmp_path, number=6)
    (batch,) = pictures.read_batches(found, 4, size=8, convert=True)
    assert batch.shape == (4, 3, 8, 8)
