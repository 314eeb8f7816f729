"""What makes PyTorch faster on a CPU: dropout from fewer random numbers, oneDNN's float32 products, memory reuse.

On a GPU, PyTorch's own implementations are used.
"""

import contextlib
import ctypes
import os
import platform

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Dropout(nn.Module):
    """Inverted dropout. On a CPU each 64-bit random word of NumPy decides for four elements: 6 to 11 times as fast as
    nn.Dropout in bfloat16, 4 to 5 times in float32."""

    kept = None  # inside RepeatedDropout a dict: (seed, shape, dtype) -> mask

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        masks = {} if Dropout.kept is None else Dropout.kept
        key = torch.randint(2**63 - 1, ()).item(), x.shape, x.dtype
        if key not in masks:
            masks[key] = self.draw_mask(*key)
        return x * masks[key]

    def draw_mask(self, seed, shape, dtype):
        """A tensor of 0 with probability p, else of 1 / (1 - p)."""
        generator, size = np.random.Generator(np.random.SFC64(seed)), shape.numel()
        words = generator.integers(2**64 - 1, size=-(-size // 4), dtype=np.uint64, endpoint=True)
        draws = torch.from_numpy(words).view(torch.int16)[:size].view(shape)  # uniform on -32768 ... 32767
        kept, scale = draws.ge_(round(self.p * 65536) - 32768), torch.tensor(1 / (1 - self.p), dtype=dtype)
        if dtype == torch.bfloat16:  # 0 or 1 times the bits of scale are the bits of 0 or scale
            return kept.mul_(scale.view(torch.int16)).view(torch.bfloat16)
        return kept * scale


class RepeatedDropout:
    """A context for `passes` forward passes in a row that makes all of them draw the same dropout masks.

    Each entry restores torch's random state to that at the creation of this object. On a CPU, the masks of the first
    pass are reused, which saves drawing them again.
    """

    def __init__(self, passes, device):
        self.cpu_state = torch.get_rng_state()
        self.module = getattr(torch, device.type)  # torch.cpu, torch.cuda or torch.mps
        self.which = [device] * (device.type == "cuda")  # the CPU and MPS have one generator
        self.state = None if device.type == "cpu" else self.module.get_rng_state(*self.which)
        self.masks = {} if passes > 1 else None

    def __enter__(self):
        torch.set_rng_state(self.cpu_state)
        if self.state is not None:
            self.module.set_rng_state(self.state, *self.which)
        Dropout.kept = self.masks

    def __exit__(self, *_):
        Dropout.kept = None


@contextlib.contextmanager
def redrawn_dropout():
    """Keep no dropout masks in the block, where activations are recomputed to save memory."""
    kept, Dropout.kept = Dropout.kept, None
    try:
        yield
    finally:
        Dropout.kept = kept


HAS_ONEDNN = torch.backends.mkldnn.is_available()


def linear(x, weight, bias=None):
    """F.linear. Float32 products on a CPU that need no gradient run on oneDNN: PyTorch would use MKL, which on AMD
    processors uses vectors of half the width."""
    is_plain = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and weight.numel()
    if is_plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and HAS_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def tune_allocator():
    """Let glibc keep the memory that tensors free, and oneDNN its generated code. Call before the first product.

    glibc returns every large block to the kernel, which zeroes it page by page at the next use: about a third of a
    training step. oneDNN generates code for every shape of a bfloat16 product, which takes longer than a small product,
    and keeps 1,024 of them by default. A ticket needs more: its layers have 6 widths, its batches 40 lengths.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")  # some 200 KB each
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
