#!/usr/bin/env python
"""What the refinement does to the images of the embedded model: with and without it, at several ratios.

pip install '.[eval]'
python scripts/check_refine.py --images 72

Trains the refinements (distill_bias.py) and draws and scores the images (agentsd-eval, protocol demo-short)
that are not there yet, then writes the figures and the tables of the document.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from agentsd.cli.comparison import psnr

ROOT = Path(__file__).resolve().parents[1]
# As with 50 steps, two in five are the agents'. bfloat16 rounds by as much as there is to measure.
STEPS, AGENT_STEPS = 5, 2
DRAWING = f"--protocol demo-short --steps {STEPS} --dtype float32 --batch-size 1"
FEATURES = 64
FOLDER = Path("runs/refine")
RATIOS = (0.4, 0.5, 0.6, 0.7)
TRAINING = "--images 6 --steps 6 --updates 200"
START, END = "<!-- scripts/check_refine.py writes from here -->", "<!-- to here -->"


def run(*words: str) -> None:
    """Run Python in the root of the repository."""
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def refinement(ratio: float) -> Path:
    """The file trained at a ratio."""
    return FOLDER / f"refine-{ratio}.safetensors"


def method(ratio: float, refined: bool) -> str:
    """As agentsd-eval names it."""
    return f"paper:ratio={ratio}" + (f",refine={refinement(ratio)}" if refined else "")


def decibels(stock: Path, drawn: Path, count: int) -> list[float]:
    """PSNR of each image to the stock image of the same seed."""
    found = []
    for name in (f"{index:05d}.png" for index in range(count)):
        with Image.open(drawn / name) as image, Image.open(stock / name) as other:
            found.append(psnr(image, other))
    return found


def collect(images: int) -> dict[str, Any]:
    """The figures of a finished run."""
    from agentsd.evaluation.methods import method as parsed

    folder = ROOT / FOLDER / "images"
    drawn: dict[str, Any] = {}
    for ratio in RATIOS:
        names = {"without": method(ratio, False), "with": method(ratio, True)}
        drawn[str(ratio)] = {
            which: {"psnr": decibels(folder / "stock", folder / parsed(name).folder, images)}
            for which, name in names.items()
        }
    about = json.loads((ROOT / FOLDER / "run.json").read_text(encoding="utf-8"))
    result = {
        "command": shlex.join(["python", "scripts/check_refine.py", *sys.argv[1:]]),
        "images": images,
        "training": json.loads((ROOT / FOLDER / "layers.json").read_text(encoding="utf-8")),
        "drawing": {key: about[key] for key in ("model", "identity", "sessions")},
        "drawn": drawn,
    }
    if images > FEATURES:
        found = json.loads((ROOT / FOLDER / "results.json").read_text(encoding="utf-8"))
        rows = {row["method"]: row["scores"]["checker_frechet"] for row in found["methods"]}
        result["stock"] = rows["stock"]
        for ratio in RATIOS:
            for which, refined in (("without", False), ("with", True)):
                drawn[str(ratio)][which]["frechet"] = rows[method(ratio, refined)]
    return result


def table(result: dict[str, Any]) -> str:
    """The figures in Markdown."""
    ratios, images, distances = result["training"]["ratios"], result["images"], "stock" in result
    lines = [
        "Relative error of a layer's output against stock in the agent phase, on trajectories not trained on, "
        "without → with the refinement:",
        "",
        "| layer | " + " | ".join(f"ratio {ratio}" for ratio in ratios) + " |",
        "|---" * (len(ratios) + 1) + "|",
    ]
    for name in next(iter(ratios.values()))["layers"]:
        pairs = [found["layers"][name]["errors"] for found in ratios.values()]
        cells = " | ".join(f"{plain:.3f} → {refined:.3f}" for plain, refined in pairs)
        lines.append(f"| {name.removesuffix('.transformer_blocks.0.attn1')} | {cells} |")
    calls = [layer["cpu_seconds"] for found in ratios.values() for layer in found["layers"].values()]
    longer = statistics.median(refined / plain for plain, refined in calls)
    training = [found["cpu_seconds"] for found in ratios.values()]
    lines += [
        "",
        f"Training took {min(training):.0f} to {max(training):.0f} s of CPU time for a ratio; a refined layer takes "
        f"{longer:.1f} times as long in the agent phase. {images} images of {STEPS} steps, {AGENT_STEPS} of them with "
        "agent attention, without → with the refinement"
        + (f"; the stock images' Fréchet distance is {_distance(result['stock'])}:" if distances else ":"),
        "",
        "| ratio | PSNR to stock, mean, dB | worst, dB | closer to stock with it |"
        + (" Fréchet distance (attribute checker) |" if distances else ""),
        "|---" * (5 if distances else 4) + "|",
    ]
    for ratio in ratios:
        found = result["drawn"][ratio]
        plain, refined = (found[which]["psnr"] for which in ("without", "with"))
        row = [f"{take(plain):.1f} → {take(refined):.1f}" for take in (statistics.mean, min)]
        row.append(f"{sum(b > a for a, b in zip(plain, refined, strict=True))} of {images}")
        if distances:
            row.append(" → ".join(_distance(found[which]["frechet"]) for which in ("without", "with")))
        lines.append(f"| {ratio} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _distance(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{score['value']:.2f} ± {(high - low) / 2:.2f}"


def write(text: str, file: Path) -> None:
    """Write a whole file or nothing."""
    partial = file.with_name(f".{file.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def main() -> None:
    """Train, draw and score what is missing; write the figures and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=72, help="of each method; a Fréchet distance needs more than 64 (default: 72)"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "refine-demo.json")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "module.md", help="where the tables go")
    args = parser.parse_args()

    if not all((ROOT / refinement(ratio)).exists() for ratio in RATIOS):
        (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
        files = ["--output", str(FOLDER / "refine-{ratio}.safetensors"), "--report", str(FOLDER / "layers.json")]
        run("scripts/distill_bias.py", "--ratio", *map(str, RATIOS), *files, *TRAINING.split())
    wanted = ["stock", *(method(ratio, refined) for ratio in RATIOS for refined in (False, True))]
    methods = [word for name in wanted for word in ("--method", name)]
    where = ["--output", str(FOLDER), "--limit", str(args.images), "--device", "cpu"]
    run(
        "-m",
        "agentsd.cli.evaluate",
        "run" if args.images > FEATURES else "generate",
        *DRAWING.split(),
        *methods,
        *where,
    )
    result = collect(args.images)
    write(json.dumps(result, indent=1) + "\n", args.output)
    if args.document.exists():
        before, rest = args.document.read_text(encoding="utf-8").split(START)
        write(f"{before}{START}\n\n{table(result)}\n{END}{rest.split(END, 1)[1]}", args.document)
    print(table(result))


if __name__ == "__main__":
    main()
