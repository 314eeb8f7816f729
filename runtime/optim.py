"""What every training loop shares: seeds of single steps, the learning-rate schedule, AdamW's parameter groups."""

import torch


def seed_step(*numbers):
    """Seed torch from these integers alone, mixed by the constants of Knuth's MMIX. Each training step seeds itself
    from (seed, step), so that a run that was killed and resumed draws what one that was never killed draws."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    torch.manual_seed(seed)


def learning_rate(peak, step, steps, warmup):
    """BERT's schedule: linearly up to `peak` over warmup x steps, then linearly down to 0."""
    rise = max(1, round(warmup * steps))
    return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def set_learning_rate(optimizer, peak, step, steps, warmup):
    """That of the schedule; in a group that has "lr_scale", so many times that."""
    for group in optimizer.param_groups:
        group["lr"] = group.get("lr_scale", 1) * learning_rate(peak, step, steps, warmup)


def decay_groups(model, weight_decay):
    """AdamW's two groups: matrices decay, biases and LayerNorms do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
