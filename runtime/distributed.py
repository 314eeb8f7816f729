"""Several processes started by torchrun: `torchrun --nproc-per-node N search.py ...`. finetune.py works the same way.

Every process holds the whole model and computes its rows of each batch; `sum_gradients` adds the gradients up once a
step, so that all processes take the same step. Everything random about a batch (its order, its masked words, FreeLB's
first delta) is drawn for the whole batch, so N processes compute the same as one. Two things differ: dropout,
which each part of a batch draws for itself, and InfoBERT, which compares the tokens of its own rows. Only process 0
prints and writes, and its files need not be visible on other machines. Without torchrun there is one process.
"""

import contextlib
import os
import sys
from datetime import timedelta

import filelock
import torch
from torch import distributed
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from runtime.cli import BadInput
from runtime.cpu import tune_allocator
from runtime.device import MachineOptions, pick_device, pick_precision, run_banner
from runtime.optim import seed_step
from runtime.start import LOCAL_RANK, RANK, WORLD


def is_main_process():
    """Whether this is process 0, which prints and writes."""
    return RANK == 0


def parent():
    """The process that started this one. On Windows, None if it has ended; os.getppid() would still return its id."""
    import psutil  # here, as it needs modules that some systems lack

    return psutil.Process().parent()


def init_distributed(device, shared=False):
    """Join the other processes. A timeout of days: process 0 may download for long, and torchrun ends all if one fails.

    shared: whether all processes use the same GPU, as with --device cuda:0, which NCCL refuses.
    """
    if WORLD > 1:
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            remedy = "unset it, or start the processes with torchrun"
            raise BadInput(f"WORLD_SIZE is {WORLD} without {', '.join(missing)}: {remedy}")
        if not is_main_process():
            sys.stdout = open(os.devnull, "w")
        backend = "nccl" if device.type == "cuda" and not shared else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=7))


def start(options):
    """Begin a script: join the other processes and print the first line. Returns (device, torch dtype of products)."""
    tune_allocator()
    device = pick_device(options.device)
    if device.type == "mps" and isinstance(options, MachineOptions):  # a script that trains
        if WORLD > 1:
            reason = "gradients cannot be summed on MPS"
            raise BadInput(f"several processes need CUDA or the CPU: {reason}; use --device cpu")
        if options.checkpointing:
            reason = "PyTorch would draw different dropout masks when it recomputes a layer"
            raise BadInput(f"--checkpointing is not for MPS, where {reason}: use --grad-accum-steps, or --device cpu")
    init_distributed(device, shared=":" in options.device)
    dtype = pick_precision(device, options.precision)
    print(run_banner(options.model, device, dtype))
    return device, dtype


def shutdown():
    if WORLD > 1:
        distributed.destroy_process_group()


def micro_batches(batch_size, accum_steps=1):
    """Yield the rows of a batch that this process computes, as slices, in at most `accum_steps` parts.

    With several parts, torch is seeded again for each, so that each has its own dropout in every process.
    """
    parts, seed = WORLD * accum_steps, torch.initial_seed()
    for part in range(RANK * accum_steps, (RANK + 1) * accum_steps):
        start, stop = batch_size * part // parts, batch_size * (part + 1) // parts
        if parts > 1:
            seed_step(seed, part)
        if start < stop:  # the last batch of an epoch may have fewer rows than there are parts
            yield slice(start, stop)


def sum_gradients(parameters):
    """Replace the .grad of each of the parameters, a list, by the sum over all processes."""
    if WORLD > 1:
        for parameter in parameters:
            if parameter.grad is None:  # this process had no rows of the batch
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        flat = parameters_to_vector(gradients)  # one message instead of hundreds
        distributed.all_reduce(flat)
        vector_to_parameters(flat, gradients)


def all_reduce_sum(tensor):
    """The sum of the tensor over all processes, in place."""
    if WORLD > 1:
        distributed.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def main_process_first():
    """Run the block in each machine's first process, then in the others, so that caches are filled once."""
    if WORLD > 1 and LOCAL_RANK > 0:
        distributed.barrier()
    yield
    if WORLD > 1 and LOCAL_RANK == 0:
        distributed.barrier()


def broadcast_from_main(work):
    """Call work() in process 0 and return its result in every process. For whatever depends on process 0's files."""
    if WORLD == 1:
        return work()
    result = [work() if is_main_process() else None]
    distributed.broadcast_object_list(result)
    return result[0]


@contextlib.contextmanager
def file_lock(path):
    """Run the block while no other command writes `path`. Process 0 holds the lock for all processes of a command."""
    lock = filelock.FileLock(f"{path}.lock")
    if is_main_process():
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"another command is writing {path}: waiting until it ends", file=sys.stderr)
            lock.acquire()
    try:
        yield
    finally:
        if is_main_process():
            with contextlib.suppress(OSError):  # Windows, where `release` does it
                os.unlink(lock.lock_file)  # a waiting command notices, and creates a new file
        lock.release()
