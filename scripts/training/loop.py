"""The training loop of every stage: updates, moving average, log and checkpoints, on one process or several."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optim
import torch
import torch.distributed as dist
from torch import Tensor, nn


class Run:
    """Where a training writes, and on what it runs."""

    def __init__(self, folder: Path, device: str = "cpu", precision: str = "bf16", save_seconds: float = 300) -> None:
        self.folder = folder
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.device = torch.device(f"cuda:{self.rank}" if device == "cuda" else device)
        self.autocast = precision == "bf16"
        self.save_seconds = save_seconds
        self.stopping = False
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wait(self) -> None:
        """Let the other processes come to the same point."""
        if self.world > 1:
            dist.barrier()

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT end the training after the update at hand, with a checkpoint."""

        def stop(*_: Any) -> None:
            self.stopping = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)


def save(content: Any, path: Path) -> None:
    """Write a checkpoint beside the last one, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def average_gradients(module: nn.Module, world: int) -> None:
    """Replace the gradients by their mean over the processes."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.div_(world).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


class Average:
    """A moving average of the weights, warmed up: decay min(limit, (1 + n) / (10 + n)) after n updates."""

    def __init__(self, module: nn.Module, limit: float) -> None:
        self.limit = limit
        self.weights = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's weights."""
        share = 1 - min(self.limit, (1 + step) / (10 + step))
        state = module.state_dict()
        kept = [value for value in self.weights.values() if value.is_floating_point()]
        fresh = [state[name] for name, value in self.weights.items() if value.is_floating_point()]
        torch._foreach_lerp_(kept, fresh, share)


def fit(
    run: Run,
    name: str,
    task: nn.Module,
    steps: int,
    batch: Callable[[int], tuple[Tensor, ...]],
    rate: Callable[[float], float],
    matrices: bool = True,
    scales: dict[str, float] | None = None,
    decay: float = 0.999,
    warmup: int = 50,
    limit_seconds: float = float("inf"),
) -> Average:
    """Minimise `task(*batch(step))["loss"]`, resuming at the stage's checkpoint if there is one.

    Args:
        run: where to write, and on what to run.
        name: of the stage: its checkpoint is `checkpoints/NAME.pt`, its log `log.jsonl`.
        task: a module whose forward returns named figures, `loss` among them.
        steps: number of updates in all.
        batch: the tensors of an update, a function of its number alone, so that a resumed run is bit-identical.
        rate: learning rate at a share of the updates.
        matrices: Muon for the matrices; otherwise AdamW for everything.
        scales: factor of the learning rate for submodules of the task; others have 1.
        decay: limit of the moving average's decay.
        warmup: updates over which the rate rises from zero.
        limit_seconds: stop, with a checkpoint, after this time.

    Returns:
        The moving average of the weights.
    """
    task.to(run.device).train()
    average = Average(task, decay)
    groups: list[dict[str, Any]] = []
    for key, module in task.named_children():
        groups += optim.groups(module, matrices, (scales or {}).get(key, 1.0))
    optimizer = optim.Muon(groups)
    path = run.folder / "checkpoints" / f"{name}.pt"
    step, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=run.device, weights_only=True)
        task.load_state_dict(state["task"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights = state["average"]
        step, seconds = state["step"], state["seconds"]
    parameters = [p for p in task.parameters() if p.requires_grad]
    started = saved = time.monotonic()
    before = seconds

    def checkpoint() -> None:
        if run.main:
            state = {"task": task.state_dict(), "optimizer": optimizer.state_dict(), "average": average.weights}
            save(state | {"step": step, "seconds": seconds}, path)

    sums: dict[str, float] = {}
    counted = 0
    while step < steps and not run.stopping and seconds - before < limit_seconds:
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * rate(step / steps) * min(1, (step + 1) / warmup)
        tensors = [tensor.to(run.device) for tensor in batch(step)]
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.autocast):
            figures = task(*tensors)
        figures["loss"].backward()
        if run.world > 1:
            average_gradients(task, run.world)
        figures["norm"] = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(task, step)
        step += 1
        seconds = before + time.monotonic() - started
        for key, value in figures.items():
            sums[key] = sums.get(key, 0.0) + value.item()
        counted += 1
        if run.main and step % 20 == 0:
            row: dict[str, Any] = {"stage": name, "step": step, "seconds": round(seconds, 1)}
            row |= {key: round(value / counted, 5) for key, value in sums.items()}
            sums, counted = {}, 0
            with (run.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        if time.monotonic() - saved > run.save_seconds:
            checkpoint()
            saved = time.monotonic()
    checkpoint()
    return average
