"""What the site takes from outside docs/: the plots beside the measurements."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"


def on_config(config: Any) -> Any:
    """Put pages that the navigation does not name at its end."""
    named = set(re.findall(r"[\w-]+\.md", str(config.nav)))
    config.nav += sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name not in named)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Give the site the plots of the measurements."""
    for plot in sorted((ROOT / RESULTS).glob("*.png")):
        files.append(File.generated(config, f"{RESULTS}/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point at the plots where they are on the site; name what has no page there."""
    markdown = markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/")
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
