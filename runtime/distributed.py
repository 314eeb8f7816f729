"""Several processes, on one machine or more: `torchrun --nproc-per-node N search.py ...`, and finetune.py likewise.

Every process holds the whole model, reads the same batches and takes its share of the rows of each;
DistributedDataParallel averages the gradients, so that all take the same step. What is random about a batch, its order,
its masked words and FreeLB's first delta, is drawn for the joint batch, whatever the number of processes: N of them
compute what one would, but for the dropout, which each draws for itself, and InfoBERT, which compares the tokens of its
own rows. Process 0 alone prints and writes; the files it writes need not be there on other machines. Without torchrun
all of this is one process, and does nothing but wait for another command that writes the same.
"""

import contextlib
import os
import sys
from datetime import timedelta
from pathlib import Path

import filelock
import torch
from torch import distributed, nn

from runtime import optim

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_main_process():
    """Whether this process prints and writes: the one of rank 0."""
    return RANK == 0


def init_distributed(device):
    """Meet the other processes; `device` is this one's. torchrun ends all where one ends in an error, so that no
    timeout is needed: process 0 may download for hours while the others wait."""
    if WORLD > 1:
        if not is_main_process():
            sys.stdout = open(os.devnull, "w")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))


def shutdown():
    if WORLD > 1:
        distributed.destroy_process_group()


@contextlib.contextmanager
def main_process_first():
    """The block at each machine's first process and then at its others, so that what it caches is made once."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if WORLD > 1 and not first:
        distributed.barrier()
    yield
    if WORLD > 1 and first:
        distributed.barrier()


def broadcast_from_main(work):
    """What work() returns at process 0, at every process: for whatever depends on the files that process 0 writes."""
    if WORLD == 1:
        return work()
    result = [work() if is_main_process() else None]
    distributed.broadcast_object_list(result)
    return result[0]


@contextlib.contextmanager
def file_lock(path):
    """The block, where `path` is written, once no other command is in one for the same path. Of several processes that
    work together the first stands for all: they meet in `at_first`."""
    lock = filelock.FileLock(f"{path}.lock")
    if is_main_process():
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"another command is at work on {path}: waiting until it ends", file=sys.stderr)
            lock.acquire()
    try:
        yield
    finally:
        if is_main_process():
            Path(lock.lock_file).unlink(missing_ok=True)  # whoever waits with it open sees that, and makes another
        lock.release()


def all_reduce_sum(number):
    """The sum of all processes' tensors."""
    if WORLD > 1:
        distributed.all_reduce(number)
    return number


class Trained(nn.Module):
    """The modules that are trained. DistributedDataParallel averages gradients of what passes through its forward."""

    def __init__(self, **modules):
        super().__init__()
        self.parts = nn.ModuleDict(modules)

    def forward(self, loss_of, delta):
        return loss_of(delta)


def together(**modules):
    """The modules as `gradients` takes them."""
    trained = Trained(**modules)
    return nn.parallel.DistributedDataParallel(trained) if WORLD > 1 else trained


def gradients(trained, ascend, loss_for, mask, dim, steps, accumulate=1, **adversary):
    """Run `climb`, freelb.freelb or freelb.pgd, on a joint batch: the parameters' .grad grows by its gradient. Returns
    its loss.

    loss_for(rows): (loss_of, anchored), as `climb` takes them, for the slice `rows` of the batch; they return what
    these rows contribute to the mean over the joint batch. mask: (B, T), of the joint batch. accumulate: parts of its
    share that a process computes one after another, which takes less memory.
    """
    parts = WORLD * accumulate
    if parts == 1:
        loss_of, extra_loss = loss_for(slice(0, len(mask)))
        return ascend(loss_of, mask, dim, steps, **adversary, extra_loss=extra_loss)
    seed, loss = torch.initial_seed(), torch.zeros((), device=mask.device)

    def add(part, last):
        first, end = len(mask) * part // parts, len(mask) * (part + 1) // parts
        rows, scale = slice(first, end), WORLD  # DistributedDataParallel divides by it
        if first == end:  # a last batch of few rows: nothing of this part counts, but the others wait for it
            rows, scale = slice(0, 1), 0
        loss_of, extra_loss = loss_for(rows)
        passes = iter(range(1, steps + 1))

        def of_part(delta):
            optim.seed_step(seed, part)  # its dropout, the same in every pass
            averaged = WORLD == 1 or (next(passes) == steps and last)  # once a step, in the last pass of all
            with contextlib.nullcontext() if averaged else trained.no_sync():
                return scale * trained(loss_of, delta[rows])

        anchored_of_part = extra_loss and (lambda gradient: scale * extra_loss(gradient[rows]))
        with torch.random.fork_rng([mask.device] if mask.is_cuda else []):  # every part draws the same joint delta
            return ascend(of_part, mask, dim, steps, **adversary, extra_loss=anchored_of_part)

    for i in range(accumulate):
        loss += add(RANK * accumulate + i, last=i == accumulate - 1)
    return all_reduce_sum(loss) / WORLD
