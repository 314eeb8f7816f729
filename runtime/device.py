"""The device and its precision, memory, and the line with which every script begins."""

import contextlib
import os
import resource
import sys
from pathlib import Path

import torch

from runtime.cli import BadInput

DEFAULT_MODEL = "bert-base-uncased" if torch.cuda.is_available() else "minilm"
MODEL_HELP = (
    "minilm (embedded), bert-base-uncased, roberta-base or another name on the hub, a folder, a file of weights"
)


def run_banner(model, device, dtype):
    """What every script that computes says first: the model and why it, the machine, the precision."""
    has = "with" if device.type == "cuda" else "without"
    why = f" (the default {has} CUDA)" if model == DEFAULT_MODEL else ""
    world = int(os.environ.get("WORLD_SIZE", 1))
    times = f"{world} processes, each " * (world > 1)
    return f"model {model}{why} on {times}{describe(device)} in {precision_name(dtype)}"


def pick_device():
    """The GPU, of several that of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= cards:
        raise BadInput(f"more processes than the {cards} GPUs of this machine: start as many with --nproc-per-node")
    return torch.device("cuda", number)


def pick_precision(device, precision):
    """torch.bfloat16 or torch.float32 from 'auto', 'bf16' or 'fp32'; auto: bfloat16 where the hardware multiplies it"""
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
    """The machine in a few words, for a script's first line."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads"


def autocast(device, dtype):
    """The parameters stay float32; matrix products run in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_memory(device):
    """Bytes: the most that this process ever held, or on a GPU that torch allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, IndexError):  # Linux's getrusage counts the parent's before the exec as well
        return int(Path("/proc/self/status").read_text("utf8").split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
