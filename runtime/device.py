"""The device, its precision and memory, and the line that every script prints first."""

import contextlib
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.cli import BadInput, option
from runtime.start import WORLD

DEFAULT_MODEL = "bert-base-uncased" if torch.cuda.is_available() else "minilm"
MODEL_HELP = "minilm (bundled), bert-base-uncased, roberta-base or another name on the hub; a folder; a weights file"


@dataclass
class MachineOptions:
    """Options of all scripts that train."""

    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto: CUDA, then MPS, then CPU", group="machine")
    precision: str = option("auto", "auto: bf16 where supported", choices=("auto", "bf16", "fp32"), group="machine")
    grad_accum_steps: int = option(1, "parts of a step, computed in turn to save memory", at_least=1, group="machine")
    checkpointing: bool = option(
        False, "recompute activations to save memory, a third more work; not on MPS", group="machine"
    )


def run_banner(model, device, dtype):
    """The first line of a script: the model and why it was chosen, the device, the precision."""
    has = "with" if torch.cuda.is_available() else "without"
    why = f" (the default {has} CUDA)" if model == DEFAULT_MODEL else ""
    processes = f"{WORLD} processes, each " if WORLD > 1 else ""
    return f"model {model}{why} on {processes}{describe(device)} in {precision_name(dtype)}"


def pick_device(name="auto"):
    """The device for --device. cuda is this process's own GPU; cuda:1 is the second GPU, for all processes."""
    kind, _, index = name.partition(":")
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind not in ("auto", *is_there) or name != kind and not (kind == "cuda" and index.isdecimal()):
        raise BadInput(f"--device {name!r}: give auto, cpu, cuda, cuda:0, cuda:1, ..., or mps")
    if kind == "auto":
        kind = next(kind for kind in is_there if is_there[kind])
    if not is_there[kind]:
        remedy = "--device auto uses what is available"
        raise BadInput(f"--device {name}: PyTorch {torch.__version__} finds no such device; {remedy}")
    if kind != "cuda":
        return torch.device(kind)
    number, count = int(index or os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        remedy = f"the first is cuda:0; torchrun takes at most --nproc-per-node {count}"
        raise BadInput(f"GPU {number} does not exist, this machine has {count} GPUs: {remedy}")
    torch.cuda.set_device(number)  # also for calls that name no device, such as torch.cuda.synchronize()
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans for every shape: a second each, for hundreds of shapes
    return torch.device(kind, number)


def pick_precision(device, precision):
    """torch.bfloat16 or torch.float32 for "auto", "bf16" or "fp32". auto: bfloat16 where the hardware supports it."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device.type == "mps":
            fast = torch.backends.mps.is_macos_or_newer(14, 0)  # before, Metal has no bfloat16
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        precision = "bf16" if fast else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def precision_name(dtype):
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def describe(device):
    """The device in a few words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple's GPU (MPS; unsupported operators run on the CPU)"
    count = torch.get_num_threads()
    return f"CPU with {count} thread{'s' * (count > 1)}"


def describe_machine(device):
    """The device with the name of its processor, for records of speed, which differs among processors."""
    return describe(device) if device.type == "cuda" else f"{describe(device)} ({processor()})"


def processor():
    """What the system knows of the processor: its name, and on Linux its numbers, since the name may be generic."""
    with contextlib.suppress(OSError):
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text("utf8").splitlines()]
        found = {key.strip(): value.strip() for key, _, value in reversed(lines)}  # of the first processor
        kinds = "model name", "cpu family", "model", "CPU implementer", "CPU part"
        return ", ".join(f"{kind} {found[kind]}".removeprefix("model name ") for kind in kinds if kind in found)
    with contextlib.suppress(OSError):
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]  # macOS
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor()


def autocast(device, dtype):
    """Run matrix products in `dtype`. The parameters stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_memory(device):
    """Peak memory in bytes: of this process, or on a GPU what torch allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError, IndexError):  # Linux's getrusage includes the parent's memory before exec
        return int(Path("/proc/self/status").read_text("utf8").split("VmHWM:")[1].split()[0]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def faster_ways(device, *ways, checkpointing=False):
    """What would make a run faster, for the line with its estimate. ways: those of the script."""
    ways += ("no --checkpointing",) if checkpointing else ()
    if device.type == "cpu":
        ways += ("a GPU",)
    elif device.type == "cuda" and torch.cuda.device_count() > WORLD:
        ways += (f"torchrun --nproc-per-node {torch.cuda.device_count()}",)
    return ", ".join(ways)
