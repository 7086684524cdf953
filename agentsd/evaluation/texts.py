"""Tables in texts, made from the files of results that they name."""

import re
import shlex
from pathlib import Path
from typing import Any

from agentsd.evaluation import report
from agentsd.evaluation.errors import tables
from agentsd.evaluation.files import read_json

PLACE = re.compile(r"<!-- agentsd-eval (\S+\.json)((?: [\w-]+)*) -->\n.*?<!-- /agentsd-eval -->", re.DOTALL)


def filled(text: Path) -> str:
    """A text with what stands between `<!-- agentsd-eval FILE.json COLUMN … -->` and `<!-- /agentsd-eval -->` renewed.

    Args:
        text: where it is; the paths of files in it start from its folder.

    Raises:
        ValueError: it has no such place, or a file is not one of results.
    """

    def renewed(found: re.Match[str]) -> str:
        start, _, _ = found[0].partition("\n")
        return f"{start}\n\n{summary(text.parent / found[1], found[2].split() or None)}\n\n<!-- /agentsd-eval -->"

    result, places = PLACE.subn(renewed, text.read_text(encoding="utf-8"))
    if not places:
        raise ValueError(f"{text} has no place for a table: <!-- agentsd-eval FILE.json --> and <!-- /agentsd-eval -->")
    return result


def summary(path: Path, columns: list[str] | None = None) -> str:
    """The commands behind a file of results, what they were run on, and its table in Markdown.

    Args:
        path: results.json, or the folder of a run, or errors.json.
        columns: keys of scores, for the first kind.

    Raises:
        ValueError: it is neither, or has no such column.
    """
    result = read_json(path) if path.is_file() else None
    if isinstance(result, dict) and "variants" in result:
        if columns:
            raise ValueError(f"{path} has no columns to choose from: it is of agentsd-eval error")
        table = tables(result)
    else:
        result = report.read(path)
        known = [column["key"] for column in result["columns"]]
        if unknown := [key for key in columns or () if key not in known]:
            raise ValueError(f"--columns is {unknown[0]!r}; it must be of {', '.join(known)}")
        table = report.table(result, columns)
    commands = "\n".join(_commands(result["provenance"]))
    return f"```bash\n{commands}\n```\n\n*{_caption(result)}*\n\n{table}"


def _commands(provenance: dict[str, Any]) -> list[str]:
    """What was typed: the last session that made images, then the scoring."""
    found = [shlex.join(session["command"]) for session in provenance.get("sessions", [])[-1:]]
    found += [part["command"] for part in (provenance, provenance.get("scored with", {})) if "command" in part]
    return list(dict.fromkeys(found))


def _caption(result: dict[str, Any]) -> str:
    provenance = result["provenance"]
    about = provenance.get("images", provenance)
    machine = (provenance.get("sessions") or [provenance])[-1]
    prompts = about.get("prompts")
    parts = [
        result.get("title"),
        prompts and f"{prompts if isinstance(prompts, int) else len(prompts)} prompts",
        about.get("steps") and f"{about['steps']} steps",
        about.get("dtype"),
        machine.get("device"),
        machine.get("threads") and f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}",
        *(machine.get(name) and f"{name} {machine[name]}" for name in ("torch", "diffusers")),
    ]
    return ", ".join(part for part in parts if part)
