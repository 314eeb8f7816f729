"""Tests of baselines/: InfoBERT and RobustT, and a search on a task's own loss."""

import json
import math
import shlex
import unittest.mock
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

import draw
import finetune
import freelb
import search
from baselines import infobert, robustt
from bert import Bert
from checkpoints import safetensors as our_safetensors
from inputs.batches import Batch
from runtime import distributed
from tests.conftest import FAMILIES, call, inputs, saved


def test_bottleneck_is_half_the_mean_squared_distance_of_sampled_token_pairs(monkeypatch):
    embeddings = torch.randn(2, 3, 4, requires_grad=True)
    present = torch.tensor([[1, 1, 0], [1, 1, 1]])
    drawn = torch.tensor([3, 0, 0, 4, 2])
    monkeypatch.setattr(torch, "randint", lambda *size, device=None: drawn)
    t = [embeddings[0, 0], embeddings[0, 1], embeddings[1, 0], embeddings[1, 1], embeddings[1, 2]]
    expected = sum(((t[i] - t[j]) ** 2).sum() for i, j in enumerate(drawn.tolist())) / 2 / 5
    torch.testing.assert_close(infobert.bottleneck(embeddings, present), expected)


@pytest.mark.parametrize("low, high", [(0.5, 0.9), (0.0, 1.0), (0.3, 0.3)])
def test_robust_tokens_are_the_middle_ranks_of_the_gradient_norm(low, high):
    lengths = [1, 2, 7, 10]
    gradient = torch.randn(4, 10, 3)
    present = torch.arange(10) < torch.tensor(lengths)[:, None]
    found = set(zip(*(part.tolist() for part in infobert.robust_tokens(gradient, present, low, high))))
    expected = set()
    for row, n in enumerate(lengths):  # same loop as the authors' code
        order = sorted(range(n), key=lambda i: gradient[row, i].norm().item())
        expected |= {(row, order[i]) for i in range(math.ceil(n * low), math.ceil(n * high))}
    assert found == expected


def test_ranks_of_robust_tokens_are_exact_at_every_length():
    lengths = torch.arange(1, 513)
    present = torch.arange(512) < lengths[:, None]
    rows, _ = infobert.robust_tokens(torch.rand(512, 512, 1), present, 0.3, 0.9)
    expected = [math.ceil(Fraction(9, 10) * n) - math.ceil(Fraction(3, 10) * n) for n in lengths.tolist()]
    assert rows.bincount(minlength=512).tolist() == expected


def test_anchor_is_infonce_over_all_pairs():
    anchor, n = infobert.Anchor(4, width=5), 6
    tokens_, sentences = torch.randn(n, 4), torch.randn(n, 4)

    def f(token, sentence):
        hidden = anchor.of_token(token) + anchor.of_sentence.weight @ sentence
        return F.softplus(anchor.score(hidden.relu()))

    together = sum(f(tokens_[i], sentences[i]) for i in range(n)) / n
    others = sum(torch.log(sum(f(tokens_[j], sentences[i]).exp() for j in range(n)) / n) for i in range(n)) / n
    torch.testing.assert_close(anchor(tokens_, sentences), (together - others).squeeze())


def test_infobert_with_zero_weights_is_freelb_and_the_anchor_never_moves_delta(tmp_path):
    saved(tmp_path, FAMILIES["bert"]["classes"], num_labels=2)
    model = Bert.load(tmp_path).train()
    anchor = infobert.Anchor(24)
    ids, mask, _ = inputs(model.config, 4, 9)
    labels, first = torch.tensor([0, 1, 1, 0]), freelb.initial_delta(mask, 24, init_mag=0.1, max_norm=0.0)
    found = {}
    for alpha, beta in ((None, None), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        model.zero_grad()
        if alpha is None:
            extra_loss = None
            loss_of = lambda delta: model.class_loss(ids, mask, None, labels, delta=delta)  # noqa: E731
        else:
            loss_of, extra_loss = infobert.InfoBERT(model, anchor, alpha, beta, 4).losses(ids, mask, None, labels)
        deltas = []

        def recorded(delta, loss_of=loss_of, deltas=deltas):
            deltas.append(delta.detach().clone())
            return loss_of(delta)

        model.eval()  # no dropout
        torch.manual_seed(3)
        freelb.freelb(recorded, first.clone(), mask, steps=3, lr=0.5, max_norm=0.0, extra_loss=extra_loss)
        found[alpha, beta] = (
            torch.stack(deltas),
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
        )
    for part in (0, 1):
        torch.testing.assert_close(found[0.0, 0.0][part], found[None, None][part])
    torch.testing.assert_close(found[1.0, 0.0][0], found[None, None][0])
    assert (found[1.0, 0.0][1] - found[None, None][1]).abs().max() > 1e-4
    assert (found[0.0, 1.0][0] - found[None, None][0])[2].abs().max() > 1e-4  # the bottleneck does move it


def test_pgd_with_the_numbers_of_freelb_trains_another_model(tiny, tmp_path):
    flags = ["--task", "bbc", "--model", tiny, "--output", tmp_path, "--ticket", "none", "--max-length", "8"]
    flags += ["--train-rows", "32", "--epochs", "1", "--adv-lr", 1, "--precision", "fp32", "--method"]
    models = []
    for method in ("freelb-textdefender", "pgd-textdefender"):
        assert call(finetune, *flags, method, "--adv-steps", 3) == 0
        models.append(tmp_path / "tiny" / "bbc" / f"none-{method}-seed0" / "model.safetensors")
    first, second = (our_safetensors.read_with_metadata(path) for path in models)
    differs = {name for name, value in first[1]["settings"].items() if value != second[1]["settings"][name]}
    assert differs == {"method"} and not torch.equal(first[0]["classifier.weight"], second[0]["classifier.weight"])


def test_infobert_has_no_dropout_on_attention(tmp_path):
    saved(tmp_path, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    model = Bert.load(tmp_path, num_labels=2).train()
    ids, mask, _ = inputs(model.config, 4, 9)
    assert not torch.equal(model.class_logits(ids, mask), model.class_logits(ids, mask))
    infobert.InfoBERT(model, infobert.Anchor(24), 0.0, 0.0, 4)
    assert torch.equal(model.class_logits(ids, mask), model.class_logits(ids, mask))


def test_gates_are_hard_concrete_variables():
    gate = robustt.Gates((200_000,), 0.9)
    weight = torch.full((200_000,), 2.0)
    torch.testing.assert_close(gate.eval()(weight).detach(), weight * 0.9)
    with torch.no_grad():
        gate.scores.fill_(-1.0)
    drawn = gate.train()(weight) / 2
    assert 0 <= drawn.min() and drawn.max() <= 1
    assert abs((drawn > 0).float().mean() - gate.open_share()) < 0.01  # Louizos et al., eq. 12


def test_the_share_of_open_gates_is_the_mean_over_query_key_and_value_apart():
    gates = {"layers.0.query_key_value": robustt.Gates((9, 3), 0.9), "pooler": robustt.Gates((3, 3), 0.9)}
    for gate in gates.values():
        gate.scores.data.normal_()
    shares = torch.cat([gate.scores for gate in gates.values()]) - 2 / 3 * math.log(0.1 / 1.1)
    expected = torch.stack([part.sigmoid().mean() for part in shares.split(3)]).mean()  # query, key, value, pooler
    torch.testing.assert_close(robustt.mean_open_share(gates), expected)


def test_robustt_clips_and_ramps_lambda_as_its_authors_code(tiny, monkeypatch):
    """The norm includes the weights' gradients, carried from step to step; a counter of steps rises by 3 a batch."""
    model, steps = Bert.load(tiny, num_labels=2), 3 * 20
    ids, mask, _ = inputs(model.config, 4, 9)
    rows = unittest.mock.MagicMock(epoch=lambda *_: range(20), batch=lambda _: Batch(ids, mask, None, ids[:, 0] % 2))
    rows.__len__.return_value = 80
    bias, ramp, clip = model.classifier.bias, torch.zeros((), requires_grad=True), torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(model, "class_loss", lambda *batch, delta: bias.sum())  # a gradient of norm sqrt(2)
    monkeypatch.setattr(robustt, "mean_open_share", lambda gates: ramp)
    norms, lambdas = [], []

    def recorded(parameters, limit):
        norms.append(bias.grad.norm().item())
        lambdas.append(0.0 if ramp.grad is None else ramp.grad.item())  # the sum until the step before
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded)
    options = robustt.Options(epochs=3, batch_size=4, adv_steps=1)
    robustt.learn_scores(options, model, rows, unittest.mock.MagicMock(metadata={}), torch.float32)
    assert torch.equal(bias, Bert.load(tiny, num_labels=2).classifier.bias)  # zeros: never trained
    assert norms == pytest.approx(([2**0.5] + [2**0.5 + 1] * 19) * 3, rel=1e-4)
    processed, expected = 0, [0.0]
    for _ in range(steps):
        processed += 3
        expected.append(expected[-1] + 0.5 * max(0, min(1, (processed - 0.1 * steps) / (0.3 * steps))))
    assert [*lambdas, ramp.grad.item()] == pytest.approx(expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
def test_exactly_the_smallest_scores_over_all_matrices_are_pruned(sparsity):
    scores = {"a": torch.randn(7, 3), "b": torch.randn(4, 5).round()}
    masks = robustt.draw(scores, sparsity)
    flat = torch.cat([scores[name].flatten() for name in scores])
    kept = torch.cat([masks[name].flatten() for name in scores])
    assert (~kept).sum() == math.ceil(sparsity * 41)
    if sparsity:
        assert flat[~kept].max() <= flat[kept].min() and masks["b"].shape == (4, 5)


def test_robustt_tickets_are_learned_resumed_and_retrained_with_pruned_weights_at_zero(tiny, tmp_path, capsys):
    flags = ["--task", "bbc", "--model", tiny, "--output", tmp_path, "--precision", "fp32", "--train-rows", "64"]
    assert call(robustt, *flags) == 2 and "--ticket none" in capsys.readouterr().err
    assert call(finetune, *flags, "--ticket", "none", "--epochs", "1", "--max-length", "16") == 0
    assert call(robustt, *flags, "--epochs", "2", "--adv-steps", "2") == 0
    path = tmp_path / "tiny" / "bbc" / "robustt-seed0.safetensors"
    masks, whole = our_safetensors.read_with_metadata(path)[0], path.read_bytes()
    assert len(masks) == 9 and sum((~mask).sum() for mask in masks.values()) == math.ceil(
        0.3 * sum(mask.numel() for mask in masks.values())
    )
    path.unlink()
    original = our_safetensors.write_safetensors
    interrupt = lambda *a: original(*a) or (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    with unittest.mock.patch.object(our_safetensors, "write_safetensors", interrupt):
        assert call(robustt, *flags, "--epochs", "2", "--adv-steps", "2") == 130
    assert call(robustt, *flags, "--epochs", "2", "--adv-steps", "2") == 0 and path.read_bytes() == whole
    assert call(finetune, *flags, "--ticket", path, "--epochs", "2", "--max-length", "16") == 0
    folder = tmp_path / "tiny" / "bbc" / "robustt-seed0-vanilla-seed0"
    model, metrics = Bert.load(folder), json.loads((folder / "metrics.json").read_text())
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()
    zeros = sum((~mask).sum().item() for mask in masks.values())
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters()) - zeros


def test_robustt_refuses_other_rows_and_prints_the_retraining_command(tiny, tmp_path, capsys, monkeypatch):
    for folder, labels in (("a", "xy"), ("b", "yx")):
        (tmp_path / folder).mkdir()
        lines = "".join(f"word {i},{labels[i % 2]}\n" for i in range(40))
        (tmp_path / folder / "mine.csv").write_text("title,kind\n" + lines)
    flags = ["--model", tiny, "--output", tmp_path, "--precision", "fp32", "--seed", "1", "--train-rows", "16"]
    flags += ["--text-columns", "title", "--label-column", "kind", "--epochs", "1", "--task"]
    assert call(finetune, *flags, tmp_path / "a" / "mine.csv", "--ticket", "none", "--max-length", 8) == 0
    assert call(robustt, *flags, tmp_path / "b" / "mine.csv") == 2
    assert "was fine-tuned on other rows than those of" in capsys.readouterr().err
    assert call(robustt, *flags, tmp_path / "a" / "mine.csv") == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("next: python finetune.py ")
    assert call(finetune, *shlex.split(line)) == 0  # exactly as printed
    metadata = [
        our_safetensors.read_with_metadata(tmp_path / "tiny" / "mine" / f"{run}-vanilla-seed1" / "model.safetensors")[
            1
        ]["settings"]
        for run in ("none", "robustt-seed1")
    ]
    differs = {name for name in metadata[0] if metadata[0][name] != metadata[1][name]}
    assert differs == {"ticket"}
    monkeypatch.setattr(distributed, "WORLD", 2)
    assert call(robustt, *flags, tmp_path / "a" / "mine.csv") == 2 and "without torchrun" in capsys.readouterr().err


def test_search_on_a_task_loss_writes_separate_coefficients(tiny, tmp_path, capsys):
    lines = "".join(f"a b,{'cd'[i % 2]} e,{i % 2}\n" for i in range(90))
    (tmp_path / "m$_$.csv").write_text("a,b,y\n" + lines)  # a name that the plots must not set as TeX
    flags = ["--model", tiny, "--objective", tmp_path / "m$_$.csv", "--output", tmp_path, "--batch-size", "8"]
    flags += ["--text-columns", "a", "b", "--label-column", "y", "--mini-epoch", "0.25", "--precision", "fp32"]
    flags += ["--seeds", "2", "--learning-rate", "1e-3"]
    assert call(search, *flags) == 0
    out = capsys.readouterr().out
    assert "m$_$.csv: 72 training rows" in out and "--coefficients" in out
    found = [
        our_safetensors.read_with_metadata(tmp_path / "tiny" / f"coefficients-m$_$-seed{i}.safetensors") for i in (0, 1)
    ]
    assert [metadata["settings"]["seed"] for _, metadata in found] == [0, 1]
    assert not torch.equal(found[0][0]["head"], found[1][0]["head"]) and (found[0][0]["ffn"] != 1).any()
    assert call(search, *flags[:-4], "--seed", "1", "--learning-rate", "1e-3") == 0
    path = tmp_path / "tiny" / "coefficients-m$_$.safetensors"
    assert torch.equal(our_safetensors.read_with_metadata(path)[0]["head"], found[1][0]["head"])
    flags = ["--model", tiny, "--output", tmp_path, "--coefficients", path]
    assert call(draw, "--task", tmp_path / "m$_$.csv", *flags) == 0
