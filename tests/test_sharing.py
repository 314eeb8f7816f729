"""Tests of sharing/: exports to transformers and TextAttack, published coefficients, plots."""

import json
import shutil
import unittest.mock
from dataclasses import asdict

import nltk
import pytest
import safetensors.torch
import torch
import transformers

import data
import draw
import finetune
import search
from bert import Bert, Config
from checkpoints import safetensors as our_safetensors
from checkpoints.tickets import read_coefficients
from gates import draw_mask, hamming
from inputs import hub, mlm_head
from inputs.batches import TokenizedSplit
from inputs.tokenizer import Tokenizer
from runtime import files
from sharing import publish
from sharing.plots import random_walk_distances
from tests.conftest import COMMIT, FAMILIES, MASKS, call, quick_search, saved, spawn, token_ids


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
        assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in target.iterdir())


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


@pytest.fixture(scope="module")
def searched(tiny, corpus, tmp_path_factory):
    """The folder of two searches, seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("searched")
    flags = ["--seeds", 2, "--gamma", "0.9", "--patience", "2"]
    assert call(search, *quick_search(tiny, corpus, folder)[1:], *flags) == 0
    return folder / "tiny"


def drawn(tiny, output, *flags):
    """The masks that draw.py draws, and the metadata of the ticket."""
    assert call(draw, "--model", tiny, "--output", output, "--tau-head", "0.4", *flags) == 0
    return our_safetensors.read_with_metadata(output / "tiny" / "rt" / "ticket.safetensors")


def test_a_ticket_from_a_packed_file_is_that_of_the_single_file(tiny, searched, tmp_path):
    singles = [searched / f"coefficients-seed{seed}.safetensors" for seed in (0, 1)]
    packed = tmp_path / "packed" / "coefficients.safetensors"
    assert call(publish, *reversed(singles), "--output", packed.parent) == 0
    assert packed.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for seed, single in enumerate(singles):
        tensors, metadata = our_safetensors.read_with_metadata(single)
        for name in ("head", "ffn"):  # lossless, by the reference implementation
            assert torch.equal(safetensors.torch.load_file(packed)[name][seed], tensors[name])
        expected = drawn(tiny, tmp_path / f"single{seed}", "--coefficients", single)
        flags = ["--coefficients", packed.parent, *(["--coefficients-seed", seed] if seed else [])]
        found = drawn(tiny, tmp_path / f"packed{seed}", *flags)
        assert all(torch.equal(found[0][name], expected[0][name]) for name in ("head", "ffn"))
        alone, packed_settings = (of[1]["coefficients_provenance"].pop("settings") for of in (expected, found))
        assert found[1]["coefficients_provenance"] == expected[1]["coefficients_provenance"]
        assert packed_settings == alone | {"model": "tiny", "corpus": "words.txt"}  # no paths of this machine
        assert found[1]["settings"] == expected[1]["settings"] | {"coefficients_seed": seed}
        names = ("model_sha256", "corpus_sha256", "config", "code", "versions")
        kept = our_safetensors.read_with_metadata(packed)[1]
        assert all(kept[name] == metadata[name] for name in names)
        assert kept["settings"] | {"seed": seed} == packed_settings
        assert kept["mini_epochs"][seed] == len(tensors["trace.loss"]) and kept["seeds"] == [0, 1]
    ticket = tmp_path / "packed1" / "tiny" / "rt" / "ticket.safetensors"
    before = ticket.read_bytes()
    flags = ["--model", tiny, "--output", tmp_path / "packed1", "--tau-head", "0.4", "--coefficients", packed]
    assert call(draw, *flags, "--coefficients-seed", 0) == 2 and ticket.read_bytes() == before  # another ticket
    assert call(draw, *flags, "--coefficients-seed", 9) == 2


def test_searches_that_differ_in_more_than_the_seed_are_not_packed(searched, tmp_path, capsys):
    path, other = searched / "coefficients-seed0.safetensors", tmp_path / "other.safetensors"
    tensors, metadata = our_safetensors.read_with_metadata(searched / "coefficients-seed1.safetensors")
    changes = {
        "learning_rate": {"settings": metadata["settings"] | {"learning_rate": 1.0}},
        "model_sha256": {"model_sha256": "0" * 64},
        "code": {"code": {"search.py": "0"}},
        "mlm_head_sha256": {"mlm_head_sha256": "0" * 64},
        "is a second search with seed 0": {"settings": metadata["settings"] | {"seed": 0}},
    }
    for reason, change in changes.items():
        our_safetensors.write_safetensors(other, tensors, metadata | change)
        assert call(publish, path, other, "--output", tmp_path / "out") == 2
        assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert call(publish, path, "--output", tmp_path / "one.safetensors") == 0
    before = (tmp_path / "one.safetensors").read_bytes()
    assert call(publish, path, "--output", tmp_path / "one.safetensors") == 2
    assert "exists: use --overwrite or another --output" in capsys.readouterr().err
    assert call(publish, tmp_path / "one.safetensors", "--output", tmp_path / "out") == 2
    assert "holds several searches" in capsys.readouterr().err
    assert (tmp_path / "one.safetensors").read_bytes() == before


def test_no_path_of_this_machine_is_published(searched, tmp_path, monkeypatch):
    tensors, metadata = our_safetensors.read_with_metadata(searched / "coefficients-seed0.safetensors")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    local = {"model": "models/tiny", "objective": "/elsewhere/mine.csv", "corpus": "/elsewhere/mine.txt"}
    our_safetensors.write_safetensors("one.safetensors", tensors, metadata | {"settings": metadata["settings"] | local})
    settings = publish.pack(["one.safetensors"])[1]["settings"]
    assert [settings[name] for name in local] == ["tiny", "mine.csv", "mine.txt"]


def test_a_packed_file_with_other_shapes_or_seeds_is_refused(tiny, searched, tmp_path, capsys):
    packed = tmp_path / "packed.safetensors"
    assert call(publish, *searched.glob("coefficients-*.safetensors"), "--output", packed) == 0
    tensors, metadata = our_safetensors.read_with_metadata(packed)
    finite = "has no finite torch.float32 tensor of shape"
    faults = {
        "one search too few": (finite, {name: tensor[:1] for name, tensor in tensors.items()}, {}),
        "a layer too many": (finite, {"ffn": torch.ones(2, 3, 40)}, {}),
        "another type": (finite, {"head": tensors["head"].double()}, {}),
        "not a number": (finite, {"ffn": tensors["ffn"].clone().fill_(float("nan"))}, {}),
        "a single search": (finite, {"head": tensors["head"][0], "ffn": tensors["ffn"][0]}, {}),
        "no seeds": ("does not say its seeds", {}, {"seeds": []}),
        "seeds that are text": ("does not say its seeds", {}, {"seeds": ["0", "1"]}),
        "several searches by search.py": (
            finite,
            {},
            {"script": "search.py", "settings": metadata["settings"] | {"seed": 0}},
        ),
    }
    for name, (reason, changed, change) in faults.items():
        our_safetensors.write_safetensors(packed, tensors | changed, metadata | change)
        assert call(draw, "--model", tiny, "--output", tmp_path / "out", "--coefficients", packed) == 2, name
        assert reason in capsys.readouterr().err, name


def test_coefficients_are_fetched_from_a_repository_on_the_hub(server, tiny, searched, tmp_path, monkeypatch, capsys):
    path = tmp_path / "packed.safetensors"
    assert call(publish, *searched.glob("coefficients-*.safetensors"), "--output", path) == 0
    server.files["coefficients.safetensors"] = path.read_bytes()
    expected = drawn(tiny, tmp_path / "file", "--coefficients", path)
    for number, name in enumerate(("owner/name", f"owner/second@{COMMIT}", "owner/name")):
        if number == 2:  # it is cached
            monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
        found = drawn(tiny, tmp_path / f"hub{number}", "--coefficients", name)
        assert all(torch.equal(found[0][key], expected[0][key]) for key in ("head", "ffn"))
        assert found[1]["coefficients_sha256"] == files.sha256(path)
        assert found[1]["coefficients_provenance"]["source"] == f"{name.partition('@')[0]}@{COMMIT}"
    asked = {path.split("/resolve/")[1].split("/")[0] for _, path, _ in server.seen if path.startswith("/owner/second")}
    assert asked == {COMMIT}
    assert call(draw, "--model", tiny, "--coefficients", "owner/other", "--output", tmp_path) == 2
    assert "--coefficients owner/other is neither a file or folder nor on the hub: " in capsys.readouterr().err
    assert call(draw, "--model", tiny, "--coefficients", tmp_path, "--output", tmp_path) == 2
    assert f"--coefficients {tmp_path}: give a file, a folder with coefficients.safetensors" in capsys.readouterr().err
    server.files["coefficients.safetensors"] = path.read_bytes().replace(b"head", b"hat!", 1)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    assert call(draw, "--model", tiny, "--coefficients", "owner/another", "--output", tmp_path) == 2
    assert "is damaged (wrong checksum)" in capsys.readouterr().err


def test_without_a_search_the_published_coefficients_of_minilm_are_used(searched, tmp_path, monkeypatch, capsys):
    published, config = tmp_path / "minilm-bbc.safetensors", Config.read(data.find_model("minilm")[0])
    _, metadata = our_safetensors.read_with_metadata(searched / "coefficients-seed0.safetensors")
    metadata |= {"script": "publish.py", "seeds": [3, 4], "config": asdict(config)}
    metadata |= {"settings": metadata["settings"] | {"model": "minilm"}, "model_sha256": data.BUNDLED["minilm"][-1]}
    tensors = {"head": torch.rand(2, 6, 12), "ffn": torch.rand(2, 6, 1536)}
    our_safetensors.write_safetensors(published, tensors, metadata)
    monkeypatch.setattr(data, "PUBLISHED", tmp_path)
    flags, folder = ["--model", "minilm", "--output", tmp_path / "runs"], tmp_path / "runs" / "minilm"
    assert call(draw, *flags) == 0
    line = "using the published coefficients of minilm on BBC News, seed 3 (python search.py makes your own)"
    assert f"no search in {folder}: {line}\n" in capsys.readouterr().out
    masks, made_by = our_safetensors.read_with_metadata(folder / "rt" / "ticket.safetensors")
    assert torch.equal(masks["ffn"], draw_mask(tensors["ffn"][0], 0.2))
    assert made_by["coefficients_provenance"]["source"] == "the published coefficients of minilm on BBC News"
    assert made_by["coefficients_sha256"] == files.sha256(published)
    other = folder / "coefficients-seed1.safetensors"
    for unfinished, remedy in ((folder / "search.state.safetensors", ""), (other, f"give --coefficients {other}, or ")):
        unfinished.write_text("")
        assert call(draw, *flags) == 2
        lacking = f"there is no {folder / 'coefficients.safetensors'}"
        assert f"{lacking}: {remedy}run python search.py" in capsys.readouterr().err
        unfinished.unlink()
    assert call(draw, "--model", "bert-base-uncased", "--output", tmp_path / "runs") == 2
    assert "bert-base-uncased/coefficients.safetensors: run python search.py" in capsys.readouterr().err
    our_safetensors.write_safetensors(published, tensors, metadata | {"model_sha256": "0" * 64})
    assert call(draw, *flags) == 2 and "of another model than minilm" in capsys.readouterr().err
    our_safetensors.write_safetensors(published, tensors, metadata)
    content = published.read_bytes()
    published.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert call(draw, *flags) == 2 and "is damaged (wrong checksum)" in capsys.readouterr().err


def test_the_published_files_are_small_and_can_be_used():
    paths = sorted(data.PUBLISHED.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in data.PUBLISHED.iterdir()) < 1_720_000
    for path in paths:
        if path.name == "minilm-mlm-head.safetensors":
            assert mlm_head.published_path(data.BUNDLED["minilm"][-1]) == path
        else:
            _, _, metadata = read_coefficients(path)
            assert metadata["model_sha256"] == data.BUNDLED["minilm"][-1] and len(metadata["seeds"]) == 10


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
