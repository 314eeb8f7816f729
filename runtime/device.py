"""The device, its precision and memory, and the line that every script prints first."""

import contextlib
import os
import sys
from pathlib import Path

import torch

from runtime.cli import BadInput

DEFAULT_MODEL = "bert-base-uncased" if torch.cuda.is_available() else "minilm"
MODEL_HELP = "minilm (bundled), bert-base-uncased, roberta-base or another name on the hub; a folder; a weights file"


def run_banner(model, device, dtype):
    """The first line of a script: the model and why it was chosen, the device, the precision."""
    has = "with" if device.type == "cuda" else "without"
    why = f" (the default {has} CUDA)" if model == DEFAULT_MODEL else ""
    world = int(os.environ.get("WORLD_SIZE", 1))
    processes = f"{world} processes, each " if world > 1 else ""
    return f"model {model}{why} on {processes}{describe(device)} in {precision_name(dtype)}"


def pick_device():
    """This process's GPU, or the CPU where there is no CUDA. Raises BadInput if there are fewer GPUs than processes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        raise BadInput(f"more processes than the {count} GPUs of this machine: set --nproc-per-node {count}")
    return torch.device("cuda", index)


def pick_precision(device, precision):
    """torch.bfloat16 or torch.float32 for "auto", "bf16" or "fp32". auto: bfloat16 where the hardware multiplies it."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
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
    return f"CPU with {torch.get_num_threads()} threads"


def autocast(device, dtype):
    """Run matrix products in `dtype`. The parameters stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_memory(device):
    """Peak memory in bytes: of this process, or on a GPU what torch allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, IndexError):  # Linux's getrusage includes the parent's memory before exec
        return int(Path("/proc/self/status").read_text("utf8").split("VmHWM:")[1].split()[0]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
