"""Tests of sharing/: exports to transformers and TextAttack."""

import json
import shutil
import unittest.mock

import nltk
import pytest
import torch
import transformers

import data
import draw
import finetune
import search
from bert import Bert
from checkpoints import safetensors as our_safetensors
from gates import draw_mask, hamming
from inputs.batches import TokenizedSplit
from inputs.tokenizer import Tokenizer
from sharing.plots import random_walk_distances
from tests.conftest import FAMILIES, MASKS, call, quick_search, saved, spawn, token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_an_export_with_equal_logits_and_tokens(tmp_path, corpus, family, capsys):
    saved(tmp_path / "model", family=family)
    model = tmp_path / "model"
    assert call(search, *quick_search(model, corpus, tmp_path)[1:], "--gamma", "0.9", "--patience", "2") == 0
    assert call(draw, "--task", "rt", "--model", model, "--output", tmp_path, "--tau-ffn", "0.5") == 0
    flags = ["--task", "rt", "--model", model, "--output", tmp_path, "--epochs", "1", "--max-length", "8"]
    texts = [texts[0] for texts, _ in data.reviews("rotten_tomatoes")][:64]
    tickets = {"drawn": True, "random": True, "none": False} if family == "bert" else {"drawn": True}
    for ticket, pruned in tickets.items():
        target = tmp_path / f"hf-{ticket}"
        assert call(finetune, *flags, "--ticket", ticket, "--export-hf", target) == 0
        assert str(target) in capsys.readouterr().out
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(target).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(target)
        folder = tmp_path / "model" / "rt" / f"{ticket}-vanilla-seed0"
        ours = Bert.load(folder).eval()
        assert (min(ours.config.neurons) < 40) == pruned and len(
            theirs.base_model.encoder.layer[0].output.dense.weight[0]
        ) == 40
        encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected = theirs(**encoded).logits
            found = ours.class_logits(encoded["input_ids"], encoded["attention_mask"].bool())
        torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
        assert token_ids(Tokenizer(folder), texts, 64) == tokenizer(texts, truncation=True)["input_ids"]
        assert theirs.config.id2label == {0: "negative", 1: "positive"}
        zeros = sum(
            (layer.intermediate.dense.weight == 0).all(1).sum().item() for layer in theirs.base_model.encoder.layer
        )
        assert zeros == (40 if pruned else 0)
        card = (target / "README.md").read_text()
        assert json.loads((folder / "metrics.json").read_text())["model_sha256"] in card and "| task | rt:" in card


def test_export_refuses_to_replace_a_model_that_is_no_export(tiny, tmp_path, capsys):
    flags = ["--task", "rt", "--model", tiny, "--output", tmp_path, "--epochs", "1", "--max-length", "8"]
    other = shutil.copytree(tiny, tmp_path / "other")
    original = (other / "model.safetensors").read_bytes()
    assert call(finetune, *flags, "--ticket", "none", "--export-hf", other) == 2
    assert "use --overwrite or another --export-hf" in capsys.readouterr().err
    assert (other / "model.safetensors").read_bytes() == original


def test_export_replaces_only_exports_and_never_the_model_itself(tiny, tmp_path, capsys):
    flags = ["--task", "rt", "--model", tiny, "--output", tmp_path, "--epochs", "1", "--max-length", "8"]
    flags += ["--ticket", "none", "--train-rows", "32", "--export-hf"]
    target, run = tmp_path / "mine", tmp_path / "tiny" / "rt" / "none-vanilla-seed0"
    target.mkdir()
    (target / "README.md").write_text("my own")
    assert call(finetune, *flags, target) == 2 and not run.exists()
    assert f"{target}: no export wrote its README.md; give another folder" in capsys.readouterr().err
    assert (target / "README.md").read_text() == "my own"
    assert call(finetune, *flags, tiny.parent / "tiny" / ".", "--overwrite") == 2
    assert "is the folder of the model itself" in capsys.readouterr().err
    original = our_safetensors.write_safetensors
    interrupt = lambda *a: original(*a) if target.name not in str(a[0]) else 1 / 0  # noqa: E731
    with unittest.mock.patch.object(our_safetensors, "write_safetensors", interrupt):
        assert call(finetune, *flags, target, "--overwrite") == 1
    assert not (target / "model.safetensors").exists()
    assert call(finetune, *flags, target) == 0  # a partial export may be replaced
    model = (run / "model.safetensors").read_bytes()
    assert call(finetune, *flags, run) == 2 and (run / "model.safetensors").read_bytes() == model
    (target / "README.md").write_text("edited")
    assert call(finetune, *flags, target) == 0 and (target / "README.md").read_text() == "edited"
    assert (
        call(finetune, *flags, shutil.copytree(run, tmp_path / "copy")) == 2
    )  # a run's folder is no export: with a ticket its layers are narrow
    assert "(export None, not 'dense'): use --overwrite or another --export-hf" in capsys.readouterr().err


def test_impossible_exports_are_refused_before_and_after_training(tiny, corpus, tmp_path, capsys):
    """A target folder that is a file, and a model that was pruned elsewhere with unknown masks."""
    flags = ["--task", "rt", "--output", tmp_path, "--ticket", "none", "--epochs", "1", "--max-length", "8"]
    (tmp_path / "file").write_text("")
    assert call(finetune, *flags, "--model", tiny, "--export-hf", tmp_path / "file") == 2
    assert "cannot write" in capsys.readouterr().err and not (tmp_path / "tiny" / "rt").exists()
    masks = [torch.tensor(mask).bool() for mask in MASKS["uneven"]]
    Bert.load(tiny).pruned(*masks).save(tmp_path / "narrow", ("0", "1"), {})
    shutil.copy(tiny / "vocab.txt", tmp_path / "narrow")
    for trained in (False, True):
        assert (tmp_path / "narrow" / "rt").exists() == trained
        assert call(finetune, *flags, "--model", tmp_path / "narrow", "--export-hf", tmp_path / "dense") == 2
        assert "narrow was pruned by unknown masks" in capsys.readouterr().err
        assert call(finetune, *flags, "--model", tmp_path / "narrow") == 0
        capsys.readouterr()


@pytest.mark.slow
def test_textattack_loads_an_export_with_equal_logits(tmp_path):
    try:
        nltk.data.find("corpora/stopwords")
    except LookupError:
        pytest.skip("TextAttack needs NLTK's data, which is not installed")
    flags = ["--task", "rt", "--output", tmp_path, "--epochs", "1", "--max-length", "8", "--ticket", "none"]
    assert call(finetune, *flags, "--export-hf", tmp_path / "hf") == 0
    script = """
import sys, transformers
from textattack.models.wrappers import HuggingFaceModelWrapper
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
wrapper = HuggingFaceModelWrapper(model.eval(), transformers.AutoTokenizer.from_pretrained(sys.argv[1]))
print(wrapper(["a fine film", "a dull, long one"]).tolist())
"""
    process = spawn(["-c", script, tmp_path / "hf"])
    out, err = process.communicate()
    assert process.returncode == 0, err
    folder = tmp_path / "minilm" / "rt" / "none-vanilla-seed0"
    model, tokenizer = Bert.load(folder).eval(), Tokenizer(folder)
    rows = TokenizedSplit(tokenizer, [(("a fine film",), 0), (("a dull, long one",), 1)], 128, torch.device("cpu"))
    with torch.no_grad():
        expected = model.class_logits(*rows.batch(torch.arange(2))[:3])
    torch.testing.assert_close(torch.tensor(json.loads(out.splitlines()[-1])), expected, atol=1e-5, rtol=1e-5)


def test_random_walks_have_the_steps_of_the_search_with_random_signs():
    torch.manual_seed(0)
    trace = {"trace.head": torch.ones(4, 3, 12), "trace.ffn": torch.ones(4, 3, 40)}
    for values in trace.values():
        values[0] += 0.01 * torch.randn(values.shape[1:])
        values[1:] = values[0]  # c rests after the first mini-epoch, and so do the masks of a random walk
        values[3] += 0.5  # all entries move alike, which changes no order
    found = random_walk_distances(trace, 1 / 6, 0.3, walks=2)
    assert found[0].isnan().all() and torch.equal(found[1:], torch.zeros(3, 2))
    steps = torch.randn(30, 3, 400) * 0.01  # if c itself moves at random, its distances are those of random walks
    trace = {"trace.head": torch.ones(30, 3, 12), "trace.ffn": 1 + steps.cumsum(0)}
    observed = [hamming(*(draw_mask(c, 0.3) for c in pair)) for pair in zip(trace["trace.ffn"], trace["trace.ffn"][1:])]
    found = random_walk_distances(trace, 1 / 6, 0.3)[1:, 1]
    torch.testing.assert_close(found, torch.tensor(observed), atol=0.03, rtol=0)
    assert found[0] > 2 * found[-1]
    steady = (torch.arange(1, 31)[:, None, None] * steps[0]) + 1  # every entry keeps its direction: masks never change
    assert (random_walk_distances(trace | {"trace.ffn": steady}, 1 / 6, 0.3)[1:, 1] > 0.02).all()
