"""Peak memory, each method or layer in a process of its own."""

import json
import resource
import subprocess
import sys
from dataclasses import asdict
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
    return _in_a_process({"setting": asdict(setting), "method": text}, text)


def layer_memory(kind: AgentSDConfig | str, count: int, setting: Setting) -> int:
    """Bytes by which one call of a layer raises the memory: its output and all in between.

    Raises:
        RuntimeError: the process failed; so it does on a CPU where the system is not Linux.
    """
    named = kind if isinstance(kind, str) else kind.to_dict()
    return _in_a_process({"setting": asdict(setting), "layer": named, "tokens": count}, f"{count} tokens")


def _in_a_process(task: dict[str, Any], what: str) -> int:
    run = [sys.executable, "-m", "agentsd.bench.memory", json.dumps(task)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {what} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


@torch.inference_mode()
def _measured(task: dict[str, Any]) -> int:
    setting = Setting(**(task["setting"] | {"latent": tuple(task["setting"]["latent"])}))
    if "method" in task:
        for kind in kinds(method(task["method"]), build(setting), setting):
            kind.call()
        return _most_memory(setting.device)
    layer = task["layer"] if isinstance(task["layer"], str) else AgentSDConfig.from_dict(task["layer"])
    call = layer_call(layer, task["tokens"], setting)
    # A first call on few tokens loads what does not depend on their number.
    layer_call(layer, 256, setting)()
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
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    if peaks:
        return peaks[0] * 1024
    # Bytes on macOS, KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(_measured(json.loads(sys.argv[1])))
