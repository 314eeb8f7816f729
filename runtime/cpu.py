"""What makes PyTorch faster on a CPU: dropout from fewer random numbers, float32 products by oneDNN, kept memory.

On a GPU each is PyTorch's own.
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
    """Inverted dropout. On CPU each 64-bit random word of NumPy's decides for four elements: in bfloat16 6 to 11 times
    as fast as nn.Dropout, in float32 4 to 5."""

    kept = None  # or the dict of `masks_kept`: factors by what they are drawn from

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.is_cuda:
            return F.dropout(x, self.p)
        masks = {} if Dropout.kept is None else Dropout.kept
        wanted = torch.randint(2**63 - 1, ()).item(), x.shape, x.dtype
        if wanted not in masks:
            masks[wanted] = self.factors(*wanted)
        return x * masks[wanted]

    def factors(self, seed, shape, dtype):
        """0 or 1 / (1 - p) for each element."""
        generator, size = np.random.Generator(np.random.SFC64(seed)), shape.numel()
        words = generator.integers(2**64 - 1, size=-(-size // 4), dtype=np.uint64, endpoint=True)
        draws = torch.from_numpy(words).view(torch.int16)[:size].view(shape)  # uniform on -32768 ... 32767
        keep, scale = draws.ge_(round(self.p * 65536) - 32768), torch.tensor(1 / (1 - self.p), dtype=dtype)
        if dtype == torch.bfloat16:  # 0 or 1 times the factor's bits are the bits of 0 or the factor
            return keep.mul_(scale.view(torch.int16)).view(torch.bfloat16)
        return keep * scale


@contextlib.contextmanager
def keep_dropout_masks(masks):
    """In the block every Dropout on a CPU keeps what it draws in the dict `masks`, and takes from there what is there,
    for forward passes that draw the same again; None: nothing is kept."""
    before, Dropout.kept = Dropout.kept, masks
    try:
        yield
    finally:
        Dropout.kept = before


HAS_ONEDNN = torch.backends.mkldnn.is_available()


def linear(x, weight, bias=None):
    """F.linear. Where float32 is multiplied on a CPU and no gradient is wanted, by oneDNN: PyTorch's own product is
    MKL's, which on AMD's processors uses vectors of half the width."""
    is_plain = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and weight.numel()
    if is_plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and HAS_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def keep_memory():
    """Let oneDNN keep the code that it generates and glibc the memory that tensors free: to be called before the first
    product on a CPU.

    oneDNN generates code for every shape of a bfloat16 product, which takes longer than a small product itself, and by
    default forgets all but 1,024: batches of 40 lengths in a ticket, whose layers have 6 widths, need more. glibc by
    default hands every large block back to the kernel, which then zeroes it page by page at the next use: about a
    third of a training step.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")  # some 200 KB each
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
