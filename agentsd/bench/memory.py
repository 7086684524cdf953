"""Peak memory, each method or layer in a process of its own."""

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from agentsd.bench.architectures import Setting, build
from agentsd.bench.calls import kinds
from agentsd.bench.layers import layer_call
from agentsd.config import AgentSDConfig
from agentsd.methods import method


def peak_memory(setting: Setting, text: str) -> int:
    """Peak memory of one call of each kind of a method, in bytes: allocated on CUDA, resident on a CPU."""
    return _alone(_of_a_method, setting, text)


def layer_memory(kind: AgentSDConfig | str, count: int, setting: Setting) -> int:
    """Bytes by which one call of a layer raises the memory: its output and all in between.

    Raises:
        OSError: on a CPU where the system is not Linux.
    """
    return _alone(_of_a_layer, kind, count, setting)


def _alone(measure: Callable[..., int], *args: Any) -> int:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _silence) as process:
        return process.submit(measure, *args).result()


def _silence() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@torch.inference_mode()
def _of_a_method(setting: Setting, text: str) -> int:
    for kind in kinds(method(text), build(setting), setting):
        kind.call()
    return _most_memory(setting.device)


@torch.inference_mode()
def _of_a_layer(kind: AgentSDConfig | str, count: int, setting: Setting) -> int:
    call = layer_call(kind, count, setting)
    # A first call on few tokens loads what does not depend on their number.
    layer_call(kind, 256, setting)()
    if torch.device(setting.device).type == "cuda":
        before = torch.cuda.memory_allocated(setting.device)
        torch.cuda.reset_peak_memory_stats(setting.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = _most_memory(setting.device)
    call()
    return _most_memory(setting.device) - before


def _most_memory(device: str) -> int:
    """The most memory that the process has had, in bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux hands ru_maxrss on from the process that starts another one: there it is the parent's where that is larger.
    if (status := Path("/proc/self/status")).exists():
        return next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM")) * 1024
    # Bytes on macOS, KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
