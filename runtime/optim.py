"""What all training loops share: a seed for each step, AdamW's parameter groups, the learning-rate schedule."""

import torch


def seed_step(*numbers):
    """Seed torch from these integers, mixed with the constants of Knuth's MMIX generator.

    Each training step seeds itself from (seed, step), so that a resumed run draws what an uninterrupted run draws.
    """
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    torch.manual_seed(seed)


def adamw(parameters, lr, weight_decay, *groups):
    """AdamW that decays matrices, and neither biases nor LayerNorms. `groups`: further parameter groups."""
    parameters = list(parameters)
    matrices = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay}
    vectors = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors, *groups], lr=lr, fused=True)


def learning_rate(peak, step, steps, warmup):
    """BERT's schedule: linear warm-up to `peak` over the share `warmup` of the steps, then linear decay to 0."""
    warmup_steps = max(1, round(warmup * steps))
    return peak * min((step + 1) / warmup_steps, (steps - step) / max(1, steps - warmup_steps))


def set_learning_rate(optimizer, peak, step, steps, warmup):
    """Set the scheduled rate in every parameter group, times the group's "lr_scale" if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = group.get("lr_scale", 1) * learning_rate(peak, step, steps, warmup)
