#!/usr/bin/env python
"""Write a training's moving average as a StableDiffusionPipeline folder in fp16.

python scripts/training/export.py --output runs/demo --stage diffusion-64 --folder runs/demo/pipeline
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sample import load


def edit(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    config = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(config, indent=2) + "\n")


def export(output: Path, stage: str, folder: Path) -> int:
    """Write the folder; the size of its weights in bytes."""
    tokenizer = {file.name: file.read_bytes() for file in (output / "model" / "tokenizer").iterdir()}
    load(output, stage).to("cpu", torch.float16).save_pretrained(folder)
    # Saved anew, the tokenizer would lose the files that older transformers read.
    for name, content in tokenizer.items():
        (folder / "tokenizer" / name).write_bytes(content)
    # transformers 5 leaves out the prefix of CLIP's weights, without which version 4 does not find them.
    text_encoder = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(text_encoder).items()}
    save_file(weights, text_encoder, metadata={"format": "pt"})
    # AutoencoderTiny writes a field that it does not read back, and warns of it; and where it was loaded from.
    edit(folder / "vae" / "config.json", block_out_channels=None, _name_or_path=None)
    # transformers loads in the dtype of the file unless it is told another, diffusers in float32.
    edit(folder / "text_encoder" / "config.json", dtype="float32")
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def main() -> None:
    """Parse the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the training")
    parser.add_argument("--stage", required=True, help="whose checkpoint")
    parser.add_argument("--folder", type=Path, required=True, help="where to write the pipeline")
    args = parser.parse_args()
    print(f"{args.folder}: {export(args.output, args.stage, args.folder) / 2**20:.1f} MiB of weights")


if __name__ == "__main__":
    main()
