"""Who imports whom: downwards only, and no two files each other."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "agentsd"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    named = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imported(name: str, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports anywhere, inside functions and for types too."""
    path, found = known[name], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: (0 if path.name == "__init__.py" else -1) or None]
            package = above[: len(above) - node.level + 1] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names if names <= known.keys() else names | {module}
    return found & known.keys()


def test_no_files_import_each_other_not_even_through_others() -> None:
    known = modules()
    graph = {name: imported(name, known) - {name} for name in known}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_walls_between_the_rooms_hold() -> None:
    """The contracts in pyproject.toml."""
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_mathematics_imports_nothing_else_of_the_package() -> None:
    known = modules()
    for name in known:
        if name.startswith("agentsd.ops"):
            assert all(other.startswith("agentsd.ops") for other in imported(name, known))


@pytest.mark.slow
def test_the_planner_and_the_host_of_other_uis_need_no_diffusers() -> None:
    code = (
        "import sys\n"
        "sys.modules['diffusers'] = sys.modules['transformers'] = None\n"
        "import agentsd.ops.attention, agentsd.ops.merging, agentsd.ops.kernels\n"
        "import agentsd.planning, agentsd.layer, agentsd.schedule, agentsd.hosts.ldm"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
