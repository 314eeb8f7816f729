"""The specification: what holds for every model, mask and batch. tests/ holds the rest, one file per folder or script.

In the order of the paper: BERT and its gates (eq. 1 to 4), drawing and early stopping (section 2.2.2 and 2.3), the
adversary (eq. 6), one step of Algorithm 1, Algorithms 1 and 2 in a chain, an interrupted search. References are
transformers, PyTorch's own autograd, the published formulas and the paper's numbers.
"""

import json
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
import transformers

import data
import draw
import finetune
import gates
import search
from bert import Bert, Config
from checkpoints import huggingface
from checkpoints import safetensors as our_safetensors
from inputs.batches import TokenizedSplit
from inputs.tokenizer import Tokenizer
from runtime.cli import BadInput
from tests.conftest import (  # noqa: F401, fixtures
    BALL,
    MASKS,
    adversarial,
    adversarial_case,
    call,
    corpus,
    gradients,
    inputs,
    kill_when,
    moved_against,
    one_step,
    own_caches,
    quick_search,
    recorded,
    saved,
    seeded,
    spawn,
    states_equal,
    tiny,
    without_progress,
)

ODD_SIZES = [
    {},
    {"num_attention_heads": 3, "intermediate_size": 130, "num_hidden_layers": 1, "hidden_size": 33},
    {"num_attention_heads": 1, "intermediate_size": 1, "num_hidden_layers": 3, "hidden_size": 5},
    {"max_position_embeddings": 512, "type_vocab_size": 3, "vocab_size": 77, "layer_norm_eps": 1e-5},
]


@pytest.mark.parametrize("sizes", ODD_SIZES)
@pytest.mark.parametrize("length", [1, 7, 64, 512])
def test_every_hidden_state_and_logit_equals_transformers(tmp_path, sizes, length):
    reference = saved(tmp_path, **sizes)
    config = reference.config
    length = min(length, config.max_position_embeddings)
    ids, mask, segments = inputs(config, 3, length)
    states_equal(Bert.load(tmp_path, mlm=True).eval(), reference, ids, mask, segments)


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_class_logits_equal_transformers(tmp_path, labels):
    reference = saved(tmp_path, transformers.BertForSequenceClassification, num_labels=labels)
    ids, mask, segments = inputs(reference.config, 4, 11)
    with torch.no_grad():
        expected = reference(ids, mask.long(), segments).logits
        model = Bert.load(tmp_path).eval()
        torch.testing.assert_close(model.class_logits(ids, mask, segments), expected, atol=1e-5, rtol=1e-5)


def test_gates_of_one_leave_all_outputs_bitwise_equal(tiny):
    model, c = Bert.load(tiny).eval(), gates.Coefficients(2, 3, 40)
    ids, mask, segments = inputs(model.config, 3, 17)
    assert torch.equal(model(ids, mask, segments, gates=c.gates), model(ids, mask, segments))


def test_gates_scale_heads_and_neurons_like_head_mask_and_hooks_in_transformers(tmp_path):
    reference = saved(tmp_path).bert
    head, ffn = torch.rand(2, 3) * 2, torch.rand(2, 40) * 2
    for layer, c in zip(reference.encoder.layer, ffn):
        layer.intermediate.register_forward_hook(lambda _, __, output, c=c: output * c)
    ids, mask, segments = inputs(reference.config, 3, 17)
    with torch.no_grad():
        expected = reference(ids, mask.long(), segments, head_mask=head).last_hidden_state
        found = Bert.load(tmp_path).eval()(ids, mask, segments, gates=(head, ffn))
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_a_gate_of_zero_equals_pruning(tiny, tmp_path, masks):
    model = Bert.load(tiny, mlm=True, num_labels=2).eval()
    head, ffn = (torch.tensor(mask).bool() for mask in masks)
    small = model.pruned(head, ffn).eval()
    ids, mask, segments = inputs(model.config, 3, 17)
    gated = model(ids, mask, segments, gates=(head.float(), ffn.float()))
    torch.testing.assert_close(small(ids, mask, segments), gated, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters()) or head.all()

    small.save(tmp_path, ("no", "yes"), {"why": "a test"})
    again = Bert.load(tmp_path, mlm=True).eval()
    assert again.initialized == [] and again.config.heads == tuple(head.sum(1).tolist())
    assert torch.equal(again.class_logits(ids, mask, segments), small.class_logits(ids, mask, segments))
    small.train()(ids, mask).sum().backward()  # a layer without neurons can be trained, too


def test_the_mlm_loss_over_gathered_positions_equals_the_loss_over_all_logits(tmp_path):
    reference = saved(tmp_path)
    ids, mask, segments = inputs(reference.config, 8, 40)
    chosen = (torch.rand(8, 40) < 0.4) & mask
    with torch.no_grad():
        expected = reference(ids, mask.long(), segments, labels=ids.where(chosen, -100)).loss
        model, positions = Bert.load(tmp_path, mlm=True).eval(), chosen.flatten().nonzero().flatten()
        found = model.mlm_loss(model(ids, mask, segments, positions=positions), ids.flatten()[positions])
    assert len(positions) > 64  # more than two chunks
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_parameter_counts_equal_those_of_the_paper():
    config = Config(num_labels=2)
    c = gates.Coefficients(12, 12, 3072)
    assert draw.count_parameters(config) == 109_483_778
    for tau_ffn, expected in ((0.2, 93_428_277), (0.3, 87_761_358)):
        assert draw.count_parameters(config, *gates.draw_masks(*c.gates, 1 / 6, tau_ffn)) == expected


@pytest.mark.parametrize("tau", [0, 0.1, 1 / 6, 0.2, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("ties", ["none", "some", "all"])
def test_exactly_ceil_tau_n_are_pruned_even_with_ties(tau, ties):
    c = {"none": torch.randn(5, 30), "some": torch.randint(0, 4, (5, 30)).float(), "all": torch.ones(5, 30)}[ties]
    for at_least_one in (False, True):
        mask = gates.draw_mask(c, tau, at_least_one)
        assert (~mask).sum() == math.ceil(Fraction(tau).limit_denominator(1000) * 150)
        if not at_least_one:  # no kept value is smaller than a pruned one; of equal values the earlier is pruned
            kept = sorted((value, i) for i, value in enumerate(c.flatten().tolist()) if mask.flatten()[i])
            gone = sorted((value, i) for i, value in enumerate(c.flatten().tolist()) if not mask.flatten()[i])
            assert not gone or gone[-1] < kept[0]


def test_every_layer_keeps_its_best_head_and_the_next_smallest_is_pruned_instead():
    c = torch.tensor([[0.1, 0.2, 0.3], [4.0, 5.0, 6.0], [1.0, 2.0, 3.0]])
    mask = gates.draw_mask(c, 4 / 9, at_least_one=True)  # the four smallest are 0.1, 0.2, 0.3 and 1
    assert mask.tolist() == [[False, False, True], [True, True, True], [False, False, True]]
    assert gates.draw_mask(c, 6 / 9, at_least_one=True).sum(1).tolist() == [1, 1, 1]
    assert gates.draw_mask(torch.ones(3, 3), 6 / 9, at_least_one=True).sum(1).tolist() == [1, 1, 1]
    with pytest.raises(BadInput, match="each of the 3 layers keeps one: choose at most 2/3"):
        gates.draw_mask(c, 7 / 9, at_least_one=True)


def test_a_layer_may_lose_all_its_neurons():
    c = torch.tensor([[0.1, 0.2], [1.0, 2.0]])
    assert gates.draw_mask(c, 0.5).tolist() == [[False, False], [True, True]]


def test_the_penalty_is_equation_5():
    c = gates.Coefficients(2, 3, 4)
    assert torch.equal(c.head, torch.ones(2, 3)) and torch.equal(c.ffn, torch.ones(2, 4))
    c.head.data[0, 0], c.ffn.data[1, 2] = -2.0, 0.5
    assert c.penalty(0.1, 0.01).item() == pytest.approx(0.1 * 7 + 0.01 * 7.5)
    c.penalty(0.1, 0.01).backward()
    assert c.head.grad[0].tolist() == pytest.approx([-0.1, 0.1, 0.1])


def test_the_search_stops_when_both_masks_are_stable_five_times_in_a_row():
    still = torch.arange(20.0).view(2, 10), torch.arange(200.0).view(2, 100)
    turned = still[0].flip(1), still[1]
    stopping = gates.EarlyStopping(0.3, 0.3, gamma=0.1, patience=5)
    for number, (head, ffn) in enumerate([still] * 5 + [turned] + [still] * 5):
        distances = stopping.update(head, ffn)
        assert not stopping.should_stop
        if number == 0:
            assert all(math.isnan(distance) for distance in distances)
        if number == 4:
            assert stopping.streak == 4 and distances == [0.0, 0.0]
        if number == 5:  # only the mask of the heads changes
            assert stopping.streak == 0 and distances == pytest.approx([8 / 20, 0.0])
    assert stopping.streak == 4
    stopping.update(*still)
    assert stopping.should_stop


@pytest.mark.parametrize("only_last", [False, True], ids=["freelb", "pgd"])
def test_one_step_without_perturbation_is_an_ordinary_training_step(tiny, only_last):
    model, ids, mask, labels = adversarial_case(tiny)
    torch.manual_seed(1)
    loss = F.cross_entropy(model.train().class_logits(ids, mask), labels)
    loss.backward()
    expected = gradients(model)
    torch.manual_seed(1)
    loss_of = recorded(model, ids, mask, labels, [])
    assert adversarial(loss_of, mask, 1, lr=1.0, init_mag=0.0, max_norm=0.0, only_last=only_last) == loss
    found = gradients(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("only_last", [False, True], ids=["freelb", "pgd"])
def test_delta_is_zero_on_padding_and_never_leaves_its_ball(tiny, only_last):
    model, ids, mask, labels = adversarial_case(tiny)
    seen = []
    adversarial(recorded(model, ids, mask, labels, seen), mask, **BALL, only_last=only_last)
    assert len(seen) == 4
    for delta in seen:
        assert (delta[~mask] == 0).all() and (delta[mask].abs().sum(-1) > 0).all()
        assert (delta.flatten(1).norm(dim=1) <= 0.7 + 1e-6).all()
    assert (seen[-1].flatten(1).norm(dim=1) > 0.69).all()  # without projection three moves of 0.5 leave it


def test_freelb_follows_the_formula_step_by_step(tiny):
    """Deltas and gradients equal a plain transcription of Algorithm 1 of Zhu et al., one example at a time, with
    transformers."""
    reference = saved(tiny.parent / "reference", transformers.BertForSequenceClassification, num_labels=2)
    model = Bert.load(tiny.parent / "reference").eval()
    ids, mask, _ = inputs(model.config, 3, 10)
    labels, seen = torch.tensor([0, 1, 1]), []
    adversarial(recorded(model, ids, mask, labels, seen), mask, **BALL)
    found = huggingface.to_huggingface(gradients(model), "bert")

    for row in range(3):
        delta = seen[0][row : row + 1].clone()
        for step in range(4):
            torch.testing.assert_close(delta, seen[step][row : row + 1], atol=1e-5, rtol=1e-4)
            delta.requires_grad_()
            words = reference.bert.embeddings.word_embeddings(ids[row : row + 1]) + delta
            logits = reference(inputs_embeds=words, attention_mask=mask[row : row + 1].long()).logits
            (F.cross_entropy(logits, labels[row : row + 1]) / 4 / 3).backward()
            delta = delta.detach() + 0.5 * delta.grad / delta.grad.norm()
            delta = delta * min(1.0, 0.7 / delta.norm().item())
    for name, parameter in reference.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)
    assert len(found) > 30


def test_pgd_takes_the_gradient_of_the_parameters_from_the_last_delta_only(tiny):
    model, ids, mask, labels = adversarial_case(tiny)
    model.eval()
    seen = []
    loss_of = recorded(model, ids, mask, labels, seen)
    adversarial(loss_of, mask, **BALL, only_last=True)
    found = gradients(model)
    loss_of(seen[3]).backward()
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 1e-4, 0.003, 10.0])
def test_one_step_of_a_search_without_adversary_follows_the_gradient_of_transformers(corpus, tmp_path, strength):
    """The gradient of c is that of the MLM loss over all logits in transformers, with its head mask and a hook on the
    neurons, plus lambda."""
    reference = saved(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    flags = ["--adv-steps", 1, "--adv-init-mag", 0, "--lambda-head", strength, "--lambda-ffn", strength]
    found, (ids, positions, labels) = one_step(tmp_path / "model", corpus, tmp_path, *flags)
    head, ffn = torch.ones(2, 3, requires_grad=True), torch.ones(2, 40, requires_grad=True)
    for i, layer in enumerate(reference.bert.encoder.layer):
        layer.intermediate.register_forward_hook(lambda _, __, output, i=i: output * ffn[i])
    states = reference.bert(ids, head_mask=head).last_hidden_state
    wanted = torch.full_like(ids.flatten(), -100)
    wanted[positions] = labels
    F.cross_entropy(reference.cls(states).flatten(0, 1), wanted).backward()
    moved_against(found, (head.grad + strength, ffn.grad + strength))
    signs = (ffn.grad + strength).sign().unique().numel()
    assert signs == (1 if strength == 10.0 else 2)  # lambda decides for some neurons, or for all


def test_search_draw_and_finetune_chain(tiny, corpus, tmp_path, capsys):
    assert call(search, *quick_search(tiny, corpus, tmp_path)[1:], "--gamma", "0.9", "--patience", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "searched 3 of 10 mini-epochs: both distances stayed below gamma = 0.9 for 2 mini-epochs" in lines[-3]
    assert lines[-1].startswith("next: python draw.py --task rt --model")
    tensors, metadata = our_safetensors.read_with_metadata(tmp_path / "tiny" / "coefficients.safetensors")
    assert tensors["head"].shape == (2, 3) and tensors["ffn"].shape == (2, 40)
    assert tensors["trace.head"].shape == (3, 2, 3) and torch.equal(tensors["trace.ffn"][-1], tensors["ffn"])
    assert (tensors["head"] != 1).all() and metadata["settings"]["seed"] == 0
    for i in (1, 2):
        pair = [gates.draw_masks(tensors["trace.head"][j], tensors["trace.ffn"][j], 1 / 6, 0.3) for j in (i - 1, i)]
        expected = [(a != b).float().mean().item() for a, b in zip(*pair)]
        assert tensors["trace.distances"][i].tolist() == pytest.approx(expected)

    assert call(draw, "--task", "rt", "--model", tiny, "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    masks = our_safetensors.read_with_metadata(tmp_path / "tiny" / "rt" / "ticket.safetensors")[0]
    assert (~masks["head"]).sum() == 1 and (~masks["ffn"]).sum() == 16
    assert "5 of 6" in printed and "64 of 80" in printed
    assert (tmp_path / "tiny" / "rt" / "ticket.png").read_bytes().startswith(b"\x89PNG")

    flags = ["--task", "rt", "--model", tiny, "--output", tmp_path, "--epochs", "1", "--max-length", "8"]
    assert call(finetune, *flags) == 0
    assert call(finetune, *flags, "--ticket", "random", "--method", "freelb", "--adv-steps", "2") == 0
    assert call(finetune, *flags, "--ticket", "none") == 0
    counts = {}
    for name in ("drawn-vanilla-seed0", "random-freelb-seed0", "none-vanilla-seed0"):
        folder = tmp_path / "tiny" / "rt" / name
        metrics = json.loads((folder / "metrics.json").read_text())
        model, rows = Bert.load(folder), data.TASKS["rt"].load(None)["test"]
        counts[name] = sum(model.config.heads), sum(model.config.neurons)
        encoded = TokenizedSplit(Tokenizer(folder), rows, 8, torch.device("cpu"))
        again = finetune.accuracy(model, encoded, 32, torch.float32)
        assert metrics["test_accuracy"] == pytest.approx(again, abs=0.01) and len(rows) == metrics["test_rows"]
    assert counts == {"drawn-vanilla-seed0": (5, 64), "random-freelb-seed0": (5, 64), "none-vanilla-seed0": (6, 80)}
    capsys.readouterr()
    assert call(finetune, *flags, "--adv-steps", "5") == 0  # up to date: nothing is trained
    printed = capsys.readouterr().out
    assert "best of 1 epochs" in printed and "--adv-steps 5 has no effect with --method vanilla" in printed
    assert call(finetune, *flags, "--alpha", "1") == 0 and "--alpha 1.0 has no effect" in capsys.readouterr().out


def test_a_killed_search_resumes_and_ends_with_the_same_bytes(tmp_path, corpus):
    model = tmp_path / "headless"
    saved(model, transformers.BertModel)
    command = [quick_search(model, corpus, tmp_path / name, "--gamma", "1e-9") for name in ("whole", "killed")]
    whole = spawn(command[0])
    folder = tmp_path / "killed" / "headless"
    kill_when(spawn(command[1]), (folder / "mlm_head.safetensors").exists)
    kill_when(spawn(command[1]), (folder / "search.state.safetensors").exists)
    first = our_safetensors.read_with_metadata(folder / "search.state.safetensors")[0]["trace.loss"]
    later = spawn(command[1])
    kill_when(
        later,
        lambda: (
            len(our_safetensors.read_with_metadata(folder / "search.state.safetensors")[0]["trace.loss"]) > len(first)
        ),
    )
    out, err = spawn(command[1]).communicate()
    assert "searched 10 of 10 mini-epochs: stopped by --epochs" in out and without_progress(err) == ""
    assert "has no MLM head" in whole.communicate()[0]
    for name in ("coefficients.safetensors", "mlm_head.safetensors", "search.png"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "headless" / name).read_bytes()
    assert not list(folder.glob("*state*")) and not list(folder.glob("*.part"))
