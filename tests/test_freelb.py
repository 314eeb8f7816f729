"""freelb.py beyond the specification: the first delta, dropout, the ascent."""

import math

import pytest
import torch
import torch.nn.functional as F

import freelb
from runtime.cpu import Dropout, RepeatedDropout
from tests.conftest import BALL, adversarial, adversarial_case, gradients, recorded


def test_the_first_delta_is_uniform_within_magnitude_over_the_root_of_tokens_times_dim():
    mask = torch.arange(100).expand(4, 100) < torch.tensor([100, 50, 25, 1])[:, None]
    for row, length in zip(freelb.initial_delta(mask, 64, 0.6, 0.0), (100, 50, 25, 1)):
        bound = 0.6 / math.sqrt(length * 64)
        assert 0.9 * bound < row.abs().max() <= bound
        assert row[:length].mean().abs() < 0.2 * bound


def test_every_pass_sees_the_same_dropout_masks(tiny):
    model, ids, mask, labels = adversarial_case(tiny)
    losses = []

    def loss_of(delta):
        losses.append(F.cross_entropy(model.train().class_logits(ids, mask, delta=0 * delta), labels))
        return losses[-1]

    adversarial(loss_of, mask, **BALL)
    adversarial(loss_of, mask, **BALL)
    first, second = [loss.item() for loss in losses[:4]], [loss.item() for loss in losses[4:]]
    assert len(set(first)) == 1 and len(set(second)) == 1 and first[0] != second[0]


@pytest.mark.parametrize("only_last", [False, True], ids=["freelb", "pgd"])
def test_keeping_the_dropout_masks_of_the_first_pass_changes_nothing(tiny, only_last, monkeypatch):
    """Equal to the bit. With checkpointing only the mask outside the layers is kept."""
    model, ids, mask, labels = adversarial_case(tiny)
    model.train()
    draw, drawn = Dropout.draw_mask, []
    monkeypatch.setattr(Dropout, "draw_mask", lambda *given: drawn.append(given) or draw(*given))

    def run(keeps=True, checkpointing=False, steps=4):
        drawn.clear()
        model.checkpointing = checkpointing
        torch.manual_seed(3)
        with monkeypatch.context() as patch:
            if not keeps:
                patch.setattr(RepeatedDropout, "__enter__", lambda self: torch.set_rng_state(self.cpu_state))
            ball = BALL | {"steps": steps}
            loss_of = lambda delta: model.class_loss(ids, mask, None, labels, delta=delta)  # noqa: E731
            loss = adversarial(loss_of, mask, **ball, only_last=only_last)
        assert Dropout.kept is None
        return {"loss": loss} | gradients(model), len(drawn)

    (kept, once), (redrawn, each) = run(), run(keeps=False)
    assert all(torch.equal(kept[name], redrawn[name]) for name in redrawn) and len(redrawn) > 30
    assert each == 4 * once and run(steps=1)[1] == once == 2 + 3 * model.config.num_hidden_layers
    checkpointed, counted = run(checkpointing=True)
    assert all(torch.equal(checkpointed[name], redrawn[name]) for name in redrawn)
    assert counted == 2 + 4 * 2 * 3 * model.config.num_hidden_layers


@pytest.mark.parametrize("only_last", [False, True], ids=["freelb", "pgd"])
def test_the_first_delta_of_the_caller_is_left_as_it_was(tiny, only_last):
    """A second call with the same delta finds no gradient of the first."""
    model, ids, mask, labels = adversarial_case(tiny)
    model.eval()
    delta = freelb.initial_delta(mask, model.config.hidden_size, 0.3, 0.7)
    before, found = delta.clone(), []
    for _ in range(2):
        loss_of = lambda delta: model.class_loss(ids, mask, None, labels, delta=delta)  # noqa: E731
        freelb.freelb(loss_of, delta, mask, 4, 0.5, 0.7, only_last=only_last)
        found.append(gradients(model))
        assert torch.equal(delta, before) and not delta.requires_grad and delta.grad is None
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]) and len(found[0]) > 30


def test_the_adversary_raises_the_loss(tiny):
    model, ids, mask, labels = adversarial_case(tiny)
    model.eval()
    clean = F.cross_entropy(model.class_logits(ids, mask), labels).item()
    seen = []
    loss_of = recorded(model, ids, mask, labels, seen)
    adversarial(loss_of, mask, steps=6, lr=0.2, init_mag=0.01, max_norm=0.0)
    assert loss_of(seen[-1]).item() > clean + 0.1


def test_every_bound_in_the_table_of_adversaries_can_bind():
    """The first delta has a norm of about magnitude / sqrt(3), and K passes have K - 1 moves between them."""
    for steps, lr, init_mag, max_norm, _ in freelb.ADVERSARIES.values():
        assert max_norm == 0 or init_mag / math.sqrt(3) + (steps - 1) * lr > max_norm


def test_the_first_delta_is_within_the_ball_of_each_example():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    free, bound = (freelb.initial_delta(mask, 16, 1.0, max_norm) for max_norm in (0, 0.3))
    assert (free.flatten(1).norm(dim=1) > 0.3).all() and (bound.flatten(1).norm(dim=1) <= 0.3 + 1e-6).all()
