"""Importance coefficients c = {c_H, c_F}, the masks drawn from them, and when to stop (sections 2.2.2 and 2.3)."""

import math

import torch
from torch import nn

from runtime.cli import BadInput


class Coefficients(nn.Module):
    """One learnable coefficient per attention head and one per FFN neuron, all starting at 1 (Algorithm 1, line 1).

    Equation 4 writes one c_F a layer; pruning neurons by it (Algorithm 2) needs one a neuron, and so it is here.
    `gates` is what `Bert.forward` takes: (c_H (layers, heads), c_F (layers, neurons)).
    """

    def __init__(self, layers, heads, neurons):
        super().__init__()
        self.head = nn.Parameter(torch.ones(layers, heads))
        self.ffn = nn.Parameter(torch.ones(layers, neurons))

    @property
    def gates(self):
        return self.head, self.ffn

    def penalty(self, lambda_head, lambda_ffn):
        """R(c) of equation 5."""
        return lambda_head * self.head.abs().sum() + lambda_ffn * self.ffn.abs().sum()


def draw_mask(coefficients, tau, at_least_one=False):
    """The mask (layers, N) bool that prunes the ceil(tau layers N) smallest coefficients of all layers together.

    Algorithm 2, lines 1-5, but ties never prune more than that: among equals the earlier position goes first. With
    `at_least_one` the best of each layer stays (section 2.3) and the next smallest elsewhere goes in its place.
    Raises BadInput where tau leaves too few for that.
    """
    layers, n = coefficients.shape
    count = math.ceil(tau * layers * n - 1e-9)  # 0.1 x 30 is 3.0000000000000004 in floating point
    if at_least_one:
        if count > layers * (n - 1):
            raise BadInput(
                f"tau {tau:.4g} prunes {count} of {layers * n} heads, but each of the {layers} layers keeps one: "
                f"choose at most {n - 1}/{n}"
            )
        best = n - 1 - coefficients.flip(1).argmax(1, keepdim=True)  # (layers, 1); among equals the last
        coefficients = coefficients.scatter(1, best, math.inf)
    mask = torch.ones(layers * n, dtype=torch.bool)
    mask[coefficients.flatten().argsort(stable=True)[:count]] = False
    return mask.view(layers, n)


def draw_masks(head, ffn, tau_head, tau_ffn):
    """(head mask, FFN mask) of a ticket."""
    return draw_mask(head, tau_head, at_least_one=True), draw_mask(ffn, tau_ffn)


def hamming(mask, other):
    """The normalized Hamming distance: the share of entries in which two masks differ, 0 to 1."""
    return (mask != other).float().mean().item()


class EarlyStopping:
    """Ends the search when both masks have hardly changed for `patience` mini-epochs in a row (section 2.2.2)."""

    def __init__(self, tau_head, tau_ffn, gamma, patience):
        self.ratios, self.gamma, self.patience = (tau_head, tau_ffn), gamma, patience
        self.masks, self.streak = None, 0

    def update(self, head, ffn):
        """Close a mini-epoch with these coefficients: draw both masks and compare them with the last ones.

        Returns their distances (heads, neurons); the first mini-epoch has nothing to compare with, hence NaN.
        """
        last, self.masks = self.masks, draw_masks(head, ffn, *self.ratios)
        distances = [hamming(old, new) for old, new in zip(last, self.masks)] if last else [math.nan, math.nan]
        self.streak = self.streak + 1 if all(distance < self.gamma for distance in distances) else 0
        return distances

    @property
    def should_stop(self):
        return self.streak >= self.patience
