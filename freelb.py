"""The inner maximization of equation 6: FreeLB (Zhu et al. 2020) and PGD (Madry et al. 2018) on token embeddings."""

import torch

from runtime.cpu import RepeatedDropout

# K passes, step size, magnitude of the first delta, epsilon (0: no bound), whether only the last pass trains (PGD).
# `infobert` and names with a suffix have the numbers of published code, the others are ours (docs/decisions.md).
ADVERSARIES = {
    "vanilla": (1, 0.0, 0.0, 0.0, False),
    "pgd": (3, 0.03, 0.05, 0.0, True),
    "freelb": (3, 0.03, 0.05, 0.0, False),
    "infobert": (3, 0.04, 0.08, 0.0, False),
    "pgd-zhu2020": (3, 0.1, 1.0, 0.6, True),
    "freelb-zhu2020": (3, 0.1, 1.0, 0.6, False),
    "pgd-textdefender": (6, 0.03, 0.05, 0.0, True),
    "freelb-textdefender": (5, 0.03, 0.05, 0.0, False),
    "freelb-earlyrobust": (5, 0.01, 0.05, 0.0, False),
}
ADVERSARY_OPTIONS = ("adv_steps", "adv_lr", "adv_init_mag", "adv_max_norm")  # replace the first four numbers


def initial_delta(token_mask, dim, init_mag, max_norm):
    """The first delta (B, T, dim): uniform within init_mag / sqrt(tokens x dim), 0 where token_mask (B, T) is 0."""
    mask = token_mask.float()[..., None]  # (B, T, 1)
    delta = torch.zeros(*token_mask.shape, dim, device=mask.device)
    if init_mag:
        tokens = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1, 1)
        delta = delta.uniform_(-1, 1) * mask * init_mag / (tokens * dim).sqrt()
    return torch.renorm(delta, 2, 0, max_norm or torch.inf)  # each example onto its L2 ball


def freelb(loss_of, delta, token_mask, steps, lr, max_norm, extra_loss=None, only_last=False):
    """Add the gradient of L_adv (eq. 6) to the parameters' .grad, and return L_adv, a scalar, without extra_loss.

    FreeLB averages the K = `steps` passes; with only_last (PGD), only the last counts. loss_of(delta): the scalar loss
    with delta (B, T, dim) added to the token embeddings. token_mask (B, T): 0 at padding. Between passes delta moves by
    `lr` along each example's gradient, within the L2 ball of radius max_norm (0: no bound). extra_loss: InfoBERT's.
    """
    mask, adversarial_loss = token_mask.float()[..., None], 0.0
    same_dropout = RepeatedDropout(steps, delta.device)
    for step in range(steps):
        last = step == steps - 1
        weight = float(last) if only_last else 1 / steps
        delta = delta.detach().requires_grad_(not last or extra_loss is not None)
        with same_dropout:  # all K passes see the same dropout masks (FreeLB, section 3.3)
            loss = loss_of(delta)
        if extra_loss is None and weight:  # one backward pass for theta, c and delta
            (loss * weight).backward()
            gradient = delta.grad  # None in the last pass, which needs no ascent
        else:
            gradient = torch.autograd.grad(loss, delta, retain_graph=extra_loss is not None)[0]
            if extra_loss is not None:
                ((loss + extra_loss(gradient)) * weight).backward()
        if not last:  # the ascent: delta + lr g / |g|, projected onto the ball
            gradient = gradient * mask
            norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-8)[:, None, None]  # (B, 1, 1)
            delta = torch.renorm(delta.detach() + lr * gradient / norm, 2, 0, max_norm or torch.inf)
        adversarial_loss += weight * loss.detach()
    return adversarial_loss
