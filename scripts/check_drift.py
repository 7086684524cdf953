"""How much the features that step reuse holds move from one step to the next, over the schedule and between prompts.

Usage: python scripts/check_drift.py --prompts 6 --steps 50
"""

import argparse

import torch
from torch import Tensor

from agentsd import pipelines
from agentsd.demo.accuracy import held_out_prompts


def moved(now: Tensor, before: Tensor) -> Tensor:
    """Relative distance, per image."""
    return ((now - before).flatten(1).norm(dim=1) / now.flatten(1).norm(dim=1)).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6, help="held-out prompts, one image each (default: 6)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()

    pipe = pipelines.load("demo", device="cpu", dtype=getattr(torch, args.dtype))
    features: list[Tensor] = []
    inputs: list[Tensor] = []
    # What enters the outermost layer of the up side; the second half of the batch has the prompt.
    edge = pipe.unet.up_blocks[-1].attentions[-2]
    edge.register_forward_hook(lambda _, args, out: features.append(out[0][len(out[0]) // 2 :].float()))
    pipe.unet.register_forward_pre_hook(lambda _, args: inputs.append(args[0][: len(args[0]) // 2].float()))
    prompts = held_out_prompts(args.prompts)
    seeds = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    pipe(prompts, num_inference_steps=args.steps, generator=seeds, output_type="latent")

    print("| steps | features move | features leave the line | input moves |\n|---|---|---|---|")
    for start in range(2, args.steps, max(1, args.steps // 10)):
        rows = range(start, min(start + max(1, args.steps // 10), args.steps))
        straight = torch.stack([moved(features[i], 2 * features[i - 1] - features[i - 2]) for i in rows]).mean(0)
        cells = [torch.stack([moved(values[i], values[i - 1]) for i in rows]).mean(0) for values in (features, inputs)]
        words = [f"{cell.mean():.3f} ± {cell.std():.3f}" for cell in (cells[0], straight, cells[1])]
        print(f"| {rows[0]}–{rows[-1]} | {' | '.join(words)} |")


if __name__ == "__main__":
    main()
