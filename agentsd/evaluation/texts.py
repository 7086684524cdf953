"""Tables in documents, made from the files of results that they name."""

import shlex
from pathlib import Path
from typing import Any

from agentsd.evaluation import report
from agentsd.results import filled, write_text

MARK = "agentsd-eval"


def renewed(document: Path) -> str:
    """A document with new tables between `<!-- agentsd-eval FILE.json COLUMN … -->` and `<!-- /agentsd-eval -->`.

    Paths start from the document's folder.

    Raises:
        ValueError: it has no such lines, or a file is not one of results.
    """
    return filled(document, MARK, lambda words: summary(document.parent / words[0], words[1:]))


def fill(documents: list[Path]) -> None:
    """Renew the tables of documents; where one cannot be, none is written."""
    for document, text in [(document, renewed(document)) for document in documents]:
        write_text(document, text)


def summary(path: Path, columns: list[str] | None = None) -> str:
    """The commands behind a file of results, what they were run on, and its table in Markdown.

    Args:
        path: results.json, or the folder of a run.
        columns: keys of scores; None is all.

    Raises:
        ValueError: it is none, or has no such column.
    """
    result = report.read(path)
    known = [column["key"] for column in result["columns"]]
    if unknown := [key for key in columns or () if key not in known]:
        raise ValueError(f"--columns is {unknown[0]!r}; it must be of {', '.join(known)}")
    commands = "\n".join(_commands(result["provenance"]))
    return f"```bash\n{commands}\n```\n\n*{_caption(result)}*\n\n{report.table(result, columns)}"


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
