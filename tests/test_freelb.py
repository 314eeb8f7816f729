"""test_freelb."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

import freelb
from runtime.cpu import Dropout
from tests.conftest import BALL, adversarial_case, gradients, recorded


def test_the_first_delta_is_uniform_within_magnitude_over_the_root_of_tokens_times_dim():
    mask = torch.arange(100).expand(4, 100) < torch.tensor([100, 50, 25, 1])[:, None]
    seen, a = [], torch.zeros((), requires_grad=True)
    freelb.freelb(
        lambda d: seen.append(d.detach()) or (d * a).sum(), mask, 64, steps=2, lr=0.0, init_mag=0.6, max_norm=0.0
    )
    for row, length in zip(seen[0], (100, 50, 25, 1)):
        bound = 0.6 / math.sqrt(length * 64)
        assert 0.9 * bound < row.abs().max() <= bound
        assert row[:length].mean().abs() < 0.2 * bound


def test_every_ascent_step_sees_the_same_dropout_mask(tiny):
    model, ids, mask, labels = adversarial_case(tiny)
    losses = []

    def loss_of(delta):
        losses.append(F.cross_entropy(model.train().class_logits(ids, mask, delta=0 * delta), labels))
        return losses[-1]

    freelb.freelb(loss_of, mask, 24, **BALL)
    freelb.freelb(loss_of, mask, 24, **BALL)
    first, second = [loss.item() for loss in losses[:4]], [loss.item() for loss in losses[4:]]
    assert len(set(first)) == 1 and len(set(second)) == 1 and first[0] != second[0]


@pytest.mark.parametrize("climb", [freelb.freelb, freelb.pgd])
def test_dropout_masks_are_drawn_once_for_all_ascent_steps_and_change_nothing(tiny, ascend, monkeypatch):
    """To the bit; with checkpointing, which saves memory, only the mask outside the layers is kept."""
    model, ids, mask, labels = adversarial_case(tiny)
    model.train()
    draw, drawn = Dropout.factors, []
    monkeypatch.setattr(Dropout, "factors", lambda *given: drawn.append(given) or draw(*given))

    def run(keeps=True, checkpointing=False, steps=4):
        drawn.clear()
        model.checkpointing = checkpointing
        torch.manual_seed(3)
        with monkeypatch.context() as patch:
            if not keeps:
                patch.setattr(freelb, "masks_kept", lambda masks: contextlib.nullcontext())
            ball = BALL | {"steps": steps}
            loss = ascend(lambda delta: model.class_loss(ids, mask, None, labels, delta=delta), mask, 24, **ball)
        assert Dropout.kept is None
        return {"loss": loss} | gradients(model), len(drawn)

    (kept, once), (anew, each) = run(), run(keeps=False)
    assert all(torch.equal(kept[name], anew[name]) for name in anew) and len(anew) > 30
    assert each == 4 * once and run(steps=1)[1] == once == 2 + 3 * model.config.num_hidden_layers
    checkpointed, counted = run(checkpointing=True)
    assert all(torch.equal(checkpointed[name], anew[name]) for name in anew)
    assert counted == 2 + 4 * 2 * 3 * model.config.num_hidden_layers


def test_the_adversary_raises_the_loss(tiny):
    model, ids, mask, labels = adversarial_case(tiny)
    model.eval()
    clean = F.cross_entropy(model.class_logits(ids, mask), labels).item()
    seen = []
    loss_of = recorded(model, ids, mask, labels, seen)
    freelb.freelb(loss_of, mask, 24, steps=6, lr=0.2, init_mag=0.01, max_norm=0.0)
    assert loss_of(seen[-1]).item() > clean + 0.1
