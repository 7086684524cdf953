"""The documents: they build without a warning, load nothing from elsewhere, and say what the code says."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import agentsd
from agentsd import KV, Agent, AgentSDConfig, Merge, Phase, StepCache
from agentsd.hosts import ldm

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
SITE = "https://github.com/agentsd/agentsd/"
RAW = "https://raw.githubusercontent.com/agentsd/agentsd/main/"
KINDS = (Agent, AgentSDConfig, KV, Merge, Phase, StepCache)
TOP = [ROOT / f"{name}.md" for name in ("README", "README.zh-CN", "CHANGELOG", "CONTRIBUTING", "SECURITY")]
PAGES = [*TOP, *sorted(DOCS.glob("*.md")), *sorted((ROOT / "agentsd").rglob("README.md"))]
# Their commands are those of the commit that measured them.
MEASURED = {"benchmarks.md", "ideas.md", "tuning.md"}
GONE = r"reuse_\w+|cross_reuse_from|kmeans_steps|match_interval|merge_(?:attn|crossattn|mlp)|use_rand|refine\w*"

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def snippets(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


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


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    assert set(re.findall(r"[\w-]+\.md", navigation)) == {page.name for page in DOCS.glob("*.md")}


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = re.sub(rf"^({re.escape(SITE)}(blob|tree)/main/|{re.escape(RAW)})", f"{ROOT}/", target).partition("#")[0]
        if path and not path.startswith("http"):
            assert (page.parent / path).exists(), target


@by_page
def test_named_files_exist(page: Path) -> None:
    if page.name in MEASURED:
        return
    named = r"(?<![\w/.])(?:agentsd|benchmarks|docs|scripts|tests)/[\w/.-]*\w\.(?:py|sh|md|json|yaml)\b"
    text = page.read_text(encoding="utf-8")
    files = {name for name in re.findall(named, text) if not re.search(r"NAME|FILE", name)}
    marks = set(re.findall(r"<!-- (scripts/\S+) ", text))
    assert {name for name in files - marks if not (ROOT / name).exists()} == set()


def test_readme_is_short_and_renders_elsewhere() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("https://")] == []
    images = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)
    assert all(image.startswith((RAW, "https://img.shields.io/badge/")) for image in images)


def rows(text: str) -> dict[str, list[str]]:
    """The rows of tables that begin with a preset's name."""
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    return {name: line.split(" | ") for name, line in found if name in AgentSDConfig.presets()}


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_figures_of_the_readme_are_those_of_the_measurements(name: str) -> None:
    measured = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    table = rows((ROOT / name).read_text(encoding="utf-8"))
    assert set(table) == set(AgentSDConfig.presets())
    for preset, cells in table.items():
        of_preset = "\n".join(
            line for line in measured.splitlines() if re.match(rf"\| {preset}\b(:ratio=0\.4)? ", line)
        )
        assert of_preset
        for speed in re.findall(r"\d+\.\d+×", " ".join(cells)):
            assert speed in of_preset
        for decibels in re.findall(r"\d+\.\d(?= / | dB)", " ".join(cells)):
            assert decibels in of_preset


def test_both_readmes_have_the_same_figures() -> None:
    english, chinese = (rows(page.read_text(encoding="utf-8")) for page in TOP[:2])
    assert {name: cells[1:] for name, cells in english.items()} == {name: cells[1:] for name, cells in chinese.items()}


@by_page
def test_examples_are_python(page: Path) -> None:
    for code in snippets(page, "python"):
        ast.parse(code)


def configurations(code: str) -> Iterator[AgentSDConfig]:
    """Every configuration that a snippet builds or hands to `apply` or `applied`."""
    known: dict[str, Any] = {kind.__name__: kind for kind in KINDS} | {"agentsd": agentsd}
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name == "AgentSDConfig":
            yield eval(ast.unparse(node), known)
        elif name in ("agentsd.apply", "agentsd.applied"):
            given = [eval(ast.unparse(arg), known) for arg in node.args[1:] if isinstance(arg, ast.Constant)]
            config = AgentSDConfig.from_preset(given[0]) if given else AgentSDConfig()
            yield config.replace(
                **{word.arg: eval(ast.unparse(word.value), known) for word in node.keywords if word.arg}
            )


@by_page
def test_examples_build_configurations(page: Path) -> None:
    found = [config for code in snippets(page, "python") for config in configurations(code)]
    for code in snippets(page, "yaml"):
        config = AgentSDConfig.from_dict(yaml.safe_load(code))
        assert AgentSDConfig.from_dict(config.to_dict()) == config
        found.append(config)
    if page in (README, DOCS / "options.md", DOCS / "how-to.md", DOCS / "step-cache.md"):
        assert found


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.yaml")), ids=lambda path: path.name)
def test_stored_configurations_load(path: Path) -> None:
    assert AgentSDConfig.from_file(path).phases


def test_the_yaml_and_the_python_of_the_options_are_the_same() -> None:
    page = DOCS / "options.md"
    written = AgentSDConfig.from_dict(yaml.safe_load(snippets(page, "yaml")[0]))
    assert written in [config for code in snippets(page, "python") for config in configurations(code)]


def test_every_option_and_preset_is_explained() -> None:
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    assert set(rows(text)) == set(AgentSDConfig.presets())
    for kind in (Phase, Agent, Merge, KV, StepCache):
        section = text.partition(f"## `{kind.__name__}`")[2].partition("\n## ")[0]
        table = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE))
        assert list(table) == [field.name for field in fields(kind)]
        for field in fields(kind):
            shown = table[field.name].strip("` ").replace(",", "" if kind is Phase else ",")
            default = {"levels": 0, "min_tokens": 1024}.get(field.name, field.default)
            assert eval(shown, {k.__name__: k for k in KINDS}) == default, field.name
    assert all(f"`{field.name}`" in text for field in fields(AgentSDConfig))
    node = (DOCS / "comfyui.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in node for name in ldm.presets())


def test_no_page_speaks_of_options_that_are_gone() -> None:
    pages = [page for page in PAGES if page.name not in MEASURED | {"CHANGELOG.md", "compatibility.md"}]
    found = {page.name: set(re.findall(rf"`[^`\n]*\b({GONE})\b", page.read_text(encoding="utf-8"))) for page in pages}
    assert {name: words for name, words in found.items() if words} == {}


@by_page
def test_marks_come_in_pairs_and_name_their_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for tool in ("agentsd-bench", "agentsd-eval"):
        opened = re.findall(rf"<!-- {tool}( [^>]*)? -->", text)
        assert len(opened) == text.count(f"<!-- /{tool} -->")
        for words in filter(None, opened):
            assert (page.parent / words.split()[0]).is_file()


def test_hosted_ci_runs_the_versions_that_are_declared() -> None:
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    declared = set(re.findall(r"Python :: (3\.\d+)", setup))
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert set(jobs["test"]["strategy"]["matrix"]["python"]) == declared
    lowest = re.search(r"python_requires = >=(3\.\d+)", setup)
    assert lowest
    assert lowest[1] in declared
    assert f'"{lowest[1]}"' in str(jobs["oldest"]).replace("'", '"')


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / "CITATION.cff"], ids=lambda p: p.name
)
def test_files_for_the_host_are_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
    if path.name == "CITATION.cff":
        assert str(yaml.safe_load(path.read_text())["version"]) == agentsd.__version__
