"""The package as it is shipped: wheel, sdist, console command, and the weight of the import."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTextModel

from agentsd.demo import MODEL

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "agentsd.bench",
    "agentsd.cli",
    "agentsd.demo",
    "agentsd.evaluation",
    "agentsd.generate",
    "agentsd.pipelines",
    "agentsd.tune",
    "agentsd.ui",
    "agentsd.view",
    "diffusers.pipelines",
    "gradio",
    "matplotlib",
    "transformers",
)


class Distributions(NamedTuple):
    sdist: Path
    wheel: Path


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def shipped() -> set[str]:
    """Return every file below agentsd/: all of them are package data or modules."""
    files = (path for path in (ROOT / "agentsd").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Build the sdist from a copy of the checkout, and the wheel from the sdist."""
    source, output = tmp_path_factory.mktemp("source") / "agentsd", tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "runs")
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    shutil.copytree(ROOT / ".ci", source / ".ci")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source)
    return Distributions(next(output.glob("*.tar.gz")), next(output.glob("*.whl")))


@pytest.fixture(scope="module")
def installed(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the scripts folder of an environment with the wheel, this environment's libraries and no checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", distributions.wheel)
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout
    Path(site_packages.strip(), "libraries.pth").write_text("\n".join(libraries) + "\n")
    return python.parent


@pytest.mark.slow
def test_wheel_holds_the_whole_package(distributions: Distributions) -> None:
    names = set(zipfile.ZipFile(distributions.wheel).namelist())
    assert shipped() - names == set()
    assert {name for name in names if not name.startswith("agentsd")} == set()
    assert not any("training" in name for name in names if name.endswith(".py"))
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_sdist_is_enough_to_build_and_test(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        path.relative_to(ROOT).as_posix() for room in ("scripts", "tests") for path in (ROOT / room).rglob("*.py")
    }
    top = {"LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.cfg", ".ci/run"}
    assert (shipped() | sources | top) - names == set()


@pytest.mark.slow
def test_metadata(distributions: Distributions) -> None:
    archive = zipfile.ZipFile(distributions.wheel)
    folder = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")).partition("/")[0]
    metadata = HeaderParser().parsestr(archive.read(f"{folder}/METADATA").decode())
    literal = re.search(r'^__version__ = "(.+)"$', (ROOT / "agentsd/__init__.py").read_text(), re.MULTILINE)
    assert literal, "the version must be a literal, so that building needs no torch"
    assert (metadata["Name"], metadata["Version"]) == ("agentsd", literal[1])
    assert metadata["License-Expression"] == "MIT"
    assert {"bench", "dev", "docs", "eval", "notebooks", "test", "ui", "ui-test", "xformers"} <= set(
        metadata.get_all("Provides-Extra", [])
    )
    assert any(url.startswith("Changelog,") for url in metadata.get_all("Project-URL", []))
    commands = archive.read(f"{folder}/entry_points.txt").decode()
    assert "agentsd-generate = agentsd.cli.generate:main" in commands
    assert "agentsd-ui = agentsd.cli.ui:main" in commands


@pytest.mark.slow
def test_wheel_generates_an_image_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import agentsd; print(agentsd.__file__)", cwd=tmp_path).stdout.strip()
    assert Path(where).is_relative_to(installed.parent)

    picture = tmp_path / "picture.png"
    prompt = "a red circle on a blue background"
    options = ["--prompt", prompt, "--steps", "2", "--device", "cpu", "--output", str(picture)]
    run(installed / "agentsd-generate", *options, cwd=tmp_path)
    with Image.open(picture) as image:
        assert (image.size, image.mode) == ((256, 256), "RGB")
        assert image.info["parameters"].startswith(prompt)


@pytest.mark.slow
def test_wheel_carries_every_preset(installed: Path, tmp_path: Path) -> None:
    code = "from agentsd import AgentSDConfig as C; print(*[n for n in C.presets() if C.from_preset(n)], sep='\\n')"
    names = run(installed / "python", "-c", code, cwd=tmp_path).stdout.split("\n")[:-1]
    assert "paper" in names
    assert sorted(names) == sorted(path.stem for path in (ROOT / "agentsd" / "configs").glob("*.yaml"))


@pytest.mark.slow
def test_installed_command_knows_the_version(distributions: Distributions, installed: Path, tmp_path: Path) -> None:
    version = distributions.wheel.name.split("-")[1]
    output = run(installed / "agentsd-generate", "--version", cwd=tmp_path).stdout
    assert output.startswith(f"agentsd {version}")


def test_embedded_model_loads_completely_on_these_libraries() -> None:
    """Other versions of transformers name weights differently, and leave at random what they do not find."""
    _, info = CLIPTextModel.from_pretrained(MODEL / "text_encoder", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    assert {pipe.text_encoder.dtype, pipe.unet.dtype, pipe.vae.dtype} == {torch.float32}


def test_embedded_model_names_no_folder() -> None:
    configs = [json.loads(path.read_text()) for path in MODEL.rglob("*.json")]
    assert [config["_name_or_path"] for config in configs if Path(config.get("_name_or_path", "")).is_absolute()] == []


@pytest.mark.slow
def test_import_loads_nothing_heavy() -> None:
    modules = run(sys.executable, "-c", "import sys, agentsd; print(*sys.modules)").stdout.split()
    assert "torch" in modules
    assert [name for name in modules if name.startswith(HEAVY)] == []


@pytest.mark.slow
def test_import_adds_at_most_a_tenth_to_torch_and_diffusers() -> None:
    def share() -> float:
        lines = run(sys.executable, "-X", "importtime", "-c", "import torch, diffusers, agentsd").stderr
        # self | cumulative | name; a module that another one imports is indented
        times = {name: int(time) for time, name in re.findall(r"\d+ \| +(\d+) \| (\S+)$", lines, re.MULTILINE)}
        return times["agentsd"] / (times["torch"] + times["diffusers"])

    assert statistics.median(share() for _ in range(3)) <= 0.1
