"""Importance coefficients c = {c_H, c_F}, the masks drawn from them, and when to stop (sections 2.2.2 and 2.3)."""

import math

import torch
from torch import nn

from runtime.cli import BadInput


class Coefficients(nn.Module):
    """One learnable coefficient per attention head and per FFN neuron, all initialized to 1 (Algorithm 1, line 1).

    Equation 4 has one c_F per layer. Algorithm 2 prunes single neurons, which needs one per neuron, as here.
    `gates`, for `Bert.forward`: (c_H (layers, heads), c_F (layers, neurons)). Masks are drawn from `scores`.
    """

    def __init__(self, layers, heads, neurons):
        super().__init__()
        self.head = nn.Parameter(torch.ones(layers, heads))
        self.ffn = nn.Parameter(torch.ones(layers, neurons))

    @property
    def gates(self):
        return self.head, self.ffn

    @property
    def scores(self):
        return self.head.detach().cpu().clone(), self.ffn.detach().cpu().clone()

    def penalty(self, lambda_head, lambda_ffn):
        """R(c) = lambda_H |c_H|_1 + lambda_F |c_F|_1 (eq. 5)."""
        return lambda_head * self.head.abs().sum() + lambda_ffn * self.ffn.abs().sum()


def draw_mask(coefficients, tau, at_least_one=False):
    """The mask (layers, N) bool that prunes the ceil(tau layers N) smallest coefficients (Algorithm 2, lines 1 to 5).

    The threshold is global, over all layers. Of equal coefficients the earlier is pruned first. at_least_one: a layer
    keeps its largest (section 2.3), and the next smallest is pruned instead; BadInput if tau is too large for that.
    """
    layers, n = coefficients.shape
    count = math.ceil(tau * layers * n - 1e-9)  # rounding must not prune one more: 0.1 * 3 * 10 is 3.0000000000000004
    if at_least_one:
        if count > layers * (n - 1):
            raise BadInput(
                f"tau {tau:.4g} prunes {count} of {layers * n} heads, but each of the {layers} layers keeps one: "
                f"choose at most {n - 1}/{n}"
            )
        best = coefficients.argsort(dim=1, stable=True)[:, -1:]  # (layers, 1): the largest, the last among equals
        coefficients = coefficients.scatter(1, best, math.inf)  # never among the smallest
    mask = torch.ones(layers * n, dtype=torch.bool)  # line 1: m <- 1
    smallest = coefficients.flatten().argsort(stable=True)[:count]  # c* is the last of these
    mask[smallest] = False  # lines 2 to 5: m <- 0 where c <= c*, except ties beyond the count
    return mask.view(layers, n)


def draw_masks(head, ffn, tau_head, tau_ffn):
    """The (head mask (layers, heads), FFN mask (layers, neurons)) of a ticket. Every layer keeps at least one head."""
    return draw_mask(head, tau_head, at_least_one=True), draw_mask(ffn, tau_ffn)  # lines 3 and 4


def hamming(mask, other):
    """The normalized Hamming distance of two masks of the same shape: the share of entries that differ, from 0 to 1."""
    return (mask != other).float().mean().item()


class EarlyStopping:
    """Stop when both masks have changed by less than gamma for `patience` mini-epochs in a row (section 2.2.2)."""

    def __init__(self, tau_head, tau_ffn, gamma, patience):
        self.ratios, self.gamma, self.patience = (tau_head, tau_ffn), gamma, patience
        self.masks, self.streak = None, 0

    def update(self, head, ffn):
        """End a mini-epoch: draw both masks from the coefficients and compare them with the previous ones.

        Returns the distances (heads, neurons). They are NaN for the first mini-epoch.
        """
        previous, self.masks = self.masks, draw_masks(head, ffn, *self.ratios)
        distances = [math.nan, math.nan]
        if previous:
            distances = [hamming(old, new) for old, new in zip(previous, self.masks)]
        is_stable = all(distance < self.gamma for distance in distances)  # never with NaN
        self.streak = self.streak + 1 if is_stable else 0
        return distances

    @property
    def should_stop(self):
        return self.streak >= self.patience
