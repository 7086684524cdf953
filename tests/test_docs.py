"""The documentation: it builds without a warning, loads nothing from elsewhere, and says what the code says."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from agentsd import AgentSDConfig, Phase
from agentsd.integrations import ldm

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    assert {path.with_suffix(".html").name for path in DOCS.glob("*.md")} <= pages.keys()
    loaded = r'<(?:script|img|iframe|source)[^>]* src="?(https?:[^">\s]+)|<link[^>]* href="?(https?:[^">\s]+)'
    assert {name: found for name, text in pages.items() if (found := re.findall(loaded, text))} == {}
    assert not any("url(http" in path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.css"))


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_examples_are_python(path: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        ast.parse(code)


def test_every_option_and_preset_is_explained() -> None:
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    elsewhere = (DOCS / "reuse.md").read_text(encoding="utf-8")
    names = {field.name for kind in (Phase, AgentSDConfig) for field in fields(kind)}
    assert {name for name in names if f"`{name}" not in text and name not in elsewhere} == set()
    presets = set(re.findall(r"^\| `(\w+)` \|", text.partition("## `attention`")[0], re.MULTILINE))
    assert presets == set(AgentSDConfig.presets())
    node = (DOCS / "comfyui.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in node for name in ldm.presets())
