"""Making the images of an evaluation, on any number of processes and as often interrupted as need be.

Images are made in batches of the protocol's size, whose members follow from their indices alone; processes share the
batches among themselves. So kernels meet the same shapes, and every image is the same bits, whoever makes it and when.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm

from agentsd.drawing import draw
from agentsd.evaluation.pictures import is_finished, label
from agentsd.evaluation.protocols import Protocol
from agentsd.evaluation.timing import Timing
from agentsd.methods import Method, prepared
from agentsd.results import environment, read_json, version, write_image, write_json


@dataclass(frozen=True)
class Run:
    """What is made, and where: `limit` images of each method, of a model with a name and a fingerprint."""

    protocol: Protocol
    methods: tuple[Method, ...]
    prompts: tuple[str, ...]
    limit: int
    model: tuple[str, str]
    output: Path
    device: torch.device
    dtype: torch.dtype
    threads: int

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything on which the bits of an image depend, but its method, its prompt and its seed."""
        keys = ("sampler", "steps", "guidance", "width", "height", "batch")
        return {key: getattr(self.protocol, key) for key in keys} | {
            "model": self.model[1],
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "threads": self.threads if self.device.type == "cpu" else None,
            "torch": torch.__version__,
            **{package: version(package) for package in ("diffusers", "transformers")},
        }

    def path(self, method: Method, index: int) -> Path:
        return self.output / "images" / method.folder / f"{index:05d}.png"

    def text(self, method: Method, index: int) -> dict[str, Any]:
        """What an image's file says about it."""
        return {
            "method": method.text,
            "settings": method.settings,
            "index": index,
            "seed": self.protocol.seed + index,
            "prompt": self.prompts[index],
            **self.identity,
        }

    def batches(self) -> list[list[int]]:
        """The indices of each batch; the last one goes beyond the limit, to the end of the protocol."""
        step, number = self.protocol.batch, len(self.prompts)
        return [list(range(start, min(start + step, number))) for start in range(0, self.limit, step)]

    def missing(self) -> list[tuple[list[int], list[Method]]]:
        """Batches with the methods of which an image is not finished."""

        def done(method: Method, indices: list[int]) -> bool:
            return all(is_finished(self.path(method, index), self.text(method, index)) for index in indices)

        every = [(part, [method for method in self.methods if not done(method, part)]) for part in self.batches()]
        return [(indices, methods) for indices, methods in every if methods]

    def _recorded(self) -> dict[str, Any] | None:
        file = self.output / "run.json"
        return read_json(file) if file.exists() else None

    def check(self) -> None:
        """Raise ValueError if the folder holds another run."""
        if (there := self._recorded()) is None:
            return
        old = {**there["identity"], "prompts": there["prompts"], "seed": there["protocol"]["seed"]}
        for key, value in {**self.identity, "prompts": list(self.prompts), "seed": self.protocol.seed}.items():
            if old.get(key) != value:
                found = "are others" if key == "prompts" else f"is {old.get(key)!r}, not {value!r}"
                raise ValueError(f"{self.output} holds a run whose {key} {found}; name another --output for this one")

    def record(self, command: Sequence[str], processes: int) -> None:
        """Write run.json: what is made, and in which sessions."""
        there = self._recorded() or {"methods": {}, "sessions": []}
        session = {"command": list(command), "processes": processes, **environment(str(self.device))}
        record = {
            "protocol": self.protocol.to_dict(),
            "model": {"name": self.model[0], "fingerprint": self.model[1]},
            "identity": self.identity,
            "limit": self.limit,
            "methods": there["methods"] | {method.text: method.settings for method in self.methods},
            "prompts": list(self.prompts),
            "sessions": [*there["sessions"], session],
        }
        write_json(self.output / "run.json", record)


class Maker:
    """Draws batches with one method, in halves where memory does not suffice."""

    def __init__(self, pipe: Any, method: Method, run: Run) -> None:
        self.method, self.run = method, run
        self.call = prepared(pipe, method)
        self.batch = run.protocol.batch
        self.warm = False

    def make(self, indices: list[int]) -> Iterator[Timing]:
        """Make the images of a batch and write those that are not finished."""
        while indices:
            part = indices[: self.batch]
            try:
                yield self._make(part)
                indices = indices[len(part) :]
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or self.batch == 1:
                    raise
                self.batch = max(1, min(self.batch, len(part)) // 2)
                tqdm.write(f"{self.method.text}: out of memory; going on with batches of {self.batch}")
                clear_device_cache(garbage_collection=True)

    def _make(self, indices: list[int]) -> Timing:
        run, protocol = self.run, self.run.protocol
        cuda = run.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(run.device)
        before = torch.cuda.memory_allocated(run.device) if cuda else 0
        drawn = draw(
            self.call,
            [run.prompts[index] for index in indices],
            [protocol.seed + index for index in indices],
            num_inference_steps=protocol.steps,
            guidance_scale=protocol.guidance,
            width=protocol.width,
            height=protocol.height,
        )
        memory = (torch.cuda.max_memory_allocated(run.device) - before) // len(indices) if cuda else None
        for index, image in zip(indices, drawn.images, strict=True):
            path, text = run.path(self.method, index), run.text(self.method, index)
            if not is_finished(path, text):
                write_image(path, image, text=label(text))
        warm, self.warm = self.warm, True
        return Timing(self.method.text, tuple(indices), drawn.seconds / len(indices), memory, warm)


@torch.inference_mode()
def generate(run: Run, load: Callable[[], Any], state: Any, command: Sequence[str] = (), quiet: bool = False) -> None:
    """Make what is missing, as `run.make` says; `load` gives the pipeline and is called only where it is needed."""
    run.check()
    missing: list[Any] = [None]
    if state.is_main_process:
        missing = [run.missing()]
        for method in run.methods:
            folder = run.path(method, 0).parent
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob(".*.tmp"):  # a kill has left it
                unfinished.unlink()
        if missing[0]:
            run.record(command, state.num_processes)
    todo = broadcast_object_list(missing)[0]
    mine = todo[state.process_index :: state.num_processes]
    if mine:
        with computing(run):
            _generate(run, load(), mine, state, quiet)
    state.wait_for_everyone()


def _generate(run: Run, pipe: Any, mine: list[tuple[list[int], list[Method]]], state: Any, quiet: bool) -> None:
    pipe.set_progress_bar_config(disable=True)
    wanted = [method for method in run.methods if any(method in methods for _, methods in mine)]
    makers = {method.text: Maker(pipe, method, run) for method in wanted}
    total = sum(len(indices) * len(methods) for indices, methods in mine)
    hidden = quiet or not state.is_main_process
    with (
        tqdm(total=total, unit="image", disable=hidden, smoothing=0.05) as bar,
        (run.output / f"timings-{state.process_index}.jsonl").open("a", encoding="utf-8") as log,
    ):
        log.write("\n")  # a kill may have cut off the last line
        for indices, methods in mine:
            for method in methods:
                bar.set_description(method.text)
                for timing in makers[method.text].make(indices):
                    log.write(json.dumps(vars(timing)) + "\n")
                    log.flush()
                    bar.set_postfix_str(f"{timing.seconds:.2f} s for each")
                    bar.update(len(timing.indices))


@contextmanager
def computing(run: Run) -> Iterator[None]:
    """Context in which the same numbers come out each time: the run's threads, deterministic kernels on CUDA."""
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    try:
        if run.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.set_deterministic_debug_mode("warn")
        else:
            torch.set_num_threads(run.threads)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
