"""The inner maximization of equation 6: FreeLB (Zhu et al. 2020) and PGD (Madry et al. 2018) on token embeddings.

Left out: perturbations bounded in the max norm, and perturbing anything but the token embeddings.
"""

import torch

from runtime.cpu import keep_dropout_masks


def freelb(loss_of, mask, dim, steps, lr, init_mag, max_norm, extra_loss=None):
    """K forward and backward passes, each but the last followed by a step up the loss; every pass's gradient counts.

    loss_of(delta): the loss on one batch whose token embeddings are moved by delta (B, T, dim). mask: (B, T), 1 at
    tokens and 0 at padding. steps: K. lr: the size of an ascent step. init_mag: of the first delta. max_norm:
    epsilon, the L2 radius per example that delta never leaves; 0: no bound, as in the authors' scripts.
    The mean gradient of the K passes is added to the parameters' .grad. Returns the mean loss. With steps = 1 and
    init_mag = 0 this is an ordinary training step. anchored(gradient at delta): a loss that every pass adds for the
    parameters alone, once that gradient is known (InfoBERT); it is not in what is returned.
    """
    return ascend(loss_of, mask, dim, steps, lr, init_mag, max_norm, [1 / steps] * steps, extra_loss)


def pgd(loss_of, mask, dim, steps, lr, init_mag, max_norm, extra_loss=None):
    """As `freelb`, but only the last pass, at the worst delta found, gives the parameters a gradient."""
    return ascend(loss_of, mask, dim, steps, lr, init_mag, max_norm, [0] * (steps - 1) + [1], extra_loss)


def ascend(loss_of, mask, dim, steps, lr, init_mag, max_norm, weights, extra_loss):
    """The loop of both: `weights` are the shares of the passes in the parameters' gradient and in the loss."""
    mask = mask.float()[..., None]  # (B, T, 1)
    tokens = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1, 1), padding not counted
    delta = torch.zeros(*mask.shape[:2], dim, device=mask.device)  # (B, T, dim)
    if init_mag:
        delta = project(delta.uniform_(-1, 1) * mask * init_mag / (tokens * dim).sqrt(), max_norm)
    random_state = torch.get_rng_state(), torch.cuda.get_rng_state() if delta.is_cuda else None
    mean_loss, dropout_masks = 0.0, {} if steps > 1 else None
    for step, weight in enumerate(weights):
        torch.set_rng_state(random_state[0])  # every pass sees the same dropout mask (FreeLB, section 3.3)
        if delta.is_cuda:
            torch.cuda.set_rng_state(random_state[1])
        last = step == steps - 1
        delta.requires_grad_(not last or extra_loss is not None)
        with keep_dropout_masks(dropout_masks):
            loss = loss_of(delta)
        if extra_loss is not None:  # the ascent follows the loss alone
            gradient = torch.autograd.grad(loss, delta, retain_graph=True)[0]
            ((loss + extra_loss(gradient)) * weight).backward()
        elif weight:
            (loss * weight).backward()
            gradient = delta.grad
        else:
            gradient = torch.autograd.grad(loss, delta)[0]
        if not last:
            gradient = gradient * mask
            length = gradient.flatten(1).norm(dim=1).clamp(min=1e-8)[:, None, None]  # (B, 1, 1)
            delta = project(delta.detach() + lr * gradient / length, max_norm)
        mean_loss += weight * loss.detach()
    return mean_loss


def project(delta, max_norm):
    """Each example's delta (B, T, dim) back into the L2 ball of radius max_norm; 0: no ball."""
    if not max_norm:
        return delta
    length = delta.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]  # (B, 1, 1)
    return delta * (max_norm / length).clamp(max=1)
