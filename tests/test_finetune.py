"""finetune.py: tickets, the best epoch, resuming, ablations, the restricted vocabulary."""

import contextlib
import json
import shutil
import unittest.mock

import pytest
import torch

import data
import finetune
import gates
from bert import Bert, Config
from checkpoints import runs
from checkpoints import safetensors as our_safetensors
from checkpoints.tickets import find_ticket
from runtime import files
from runtime.cli import BadInput
from runtime.embeddings import restrict_vocabulary
from tests.conftest import MINILM, call, change, kill_when, spawn, without_progress


def test_killed_fine_tuning_resumes_and_ends_with_the_same_bytes(tiny, tmp_path):
    flags = ["--task", "bbc", "--model", tiny, "--ticket", "none", "--epochs", 3, "--max-length", 12]
    flags += ["--precision", "fp32"]
    command = [["finetune.py", *flags, "--output", tmp_path / name] for name in ("whole", "killed")]
    whole, folder = spawn(command[0]), tmp_path / "killed" / "tiny" / "bbc" / "none-vanilla-seed0"
    kill_when(spawn(command[1]), (folder / "finetune.state.safetensors").exists)
    out, err = spawn(command[1]).communicate()
    assert "best of 3 epochs" in out and without_progress(err) == "" and whole.wait() == 0
    other = tmp_path / "whole" / "tiny" / "bbc" / "none-vanilla-seed0"
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}


def test_a_random_ticket_has_the_size_of_the_drawn_one_and_depends_on_the_seed(tmp_path):
    path, config = tmp_path / "ticket.safetensors", Config.read(MINILM / "config.json")
    drawn = gates.draw_masks(torch.randn(6, 12), torch.randn(6, 1536), 1 / 6, 0.2)
    metadata = {"script": "draw.py", "model_sha256": "f00", "settings": {"tau_head": 1 / 6, "tau_ffn": 0.2}}
    our_safetensors.write_safetensors(path, {"head": drawn[0], "ffn": drawn[1]}, metadata)
    tickets = {}
    for name, seed in (("drawn", 0), ("random", 0), ("random", 1), ("random", 0)):
        options = finetune.Options(ticket=name, seed=seed)
        tickets.setdefault((name, seed), []).append(find_ticket(options, path, "f00", config)[0])
    first, again = tickets["random", 0]
    other, same = tickets["random", 1][0], tickets["drawn", 0][0]
    for part in (0, 1):
        assert torch.equal(same[part], drawn[part]) and torch.equal(first[part], again[part])
        assert first[part].sum() == other[part].sum() == drawn[part].sum()
        assert not torch.equal(first[part], other[part]) and not torch.equal(first[part], drawn[part])


def test_a_ticket_of_a_custom_imdb_file_is_not_that_of_the_task_imdb(tiny, tmp_path):
    config, path = Config.read(tiny), tmp_path / "ticket.safetensors"
    masks = dict(zip(("head", "ffn"), gates.draw_masks(torch.rand(2, 3), torch.rand(2, 40), 1 / 6, 0.2)))
    for drawn_for, task in (("imdb", "imdb"), ("mine", "mine.csv"), ("a/imdb.csv", "imdb")):
        refused = drawn_for == "a/imdb.csv"
        metadata = {"script": "draw.py", "model_sha256": "f00", "settings": {"task": drawn_for}}
        our_safetensors.write_safetensors(path, masks, metadata)
        with pytest.raises(BadInput, match="was drawn for a/imdb.csv") if refused else contextlib.nullcontext():
            find_ticket(finetune.Options(task=task), path, "f00", config)


def test_the_best_epoch_is_kept_and_methods_differ(tiny, tmp_path, monkeypatch):
    """With made-up held-out accuracies, the saved model is the one of the highest, the earliest of equals. FreeLB
    trains another model than ordinary training."""
    flags = ["--task", "bbc", "--model", tiny, "--ticket", "none", "--max-length", 8, "--precision", "fp32"]
    seen = []

    def made_up(model, rows, batch_size, dtype):
        seen.append(model.classifier.weight.detach().clone())
        return [0.4, 0.6, 0.6, 0.9][len(seen) - 1]  # three epochs, then the test rows

    monkeypatch.setattr(finetune, "accuracy", made_up)
    kept = {}
    for method in ("vanilla", "freelb"):
        seen.clear()
        assert call(finetune, *flags, "--output", tmp_path, "--epochs", 3, "--method", method) == 0
        folder = tmp_path / "tiny" / "bbc" / f"none-{method}-seed0"
        kept[method] = Bert.load(folder).classifier.weight
        assert torch.equal(kept[method], seen[1]) and not torch.equal(seen[1], seen[2])
        metrics = json.loads((folder / "metrics.json").read_text())
        assert (metrics["best_epoch"], metrics["validation_accuracy"], metrics["test_accuracy"]) == (2, 0.6, 0.9)
    assert not torch.equal(kept["vanilla"], kept["freelb"])


def test_training_only_the_words_that_occur_equals_training_all_words(tiny, tmp_path, monkeypatch):
    """The second epoch is the best: words that do not occur have decayed in two epochs."""
    flags = ["--task", "bbc", "--model", tiny, "--ticket", "none", "--max-length", 8, "--train-rows", 64]
    flags += ["--precision", "fp32", "--epochs", 3, "--weight-decay", 0.5, "--learning-rate", 0.01]
    narrow, made, left_out = restrict_vocabulary, {}, []

    def recorded(model, *sets):
        model, words = narrow(model, *sets)
        left_out.extend(set(range(len(before))) - set(words.tolist()))
        return model, words

    before = Bert.load(tiny).word_embeddings.weight
    for name, way in (("some", recorded), ("all", lambda model, *sets: (model, torch.arange(len(before))))):
        scores = iter([0.4, 0.6, 0.5, 0.5])
        monkeypatch.setattr(finetune, "accuracy", lambda *_: next(scores))
        monkeypatch.setattr(finetune, "restrict_vocabulary", way)
        assert call(finetune, *flags, "--output", tmp_path / name) == 0
        folder = tmp_path / name / "tiny" / "bbc" / "none-vanilla-seed0"
        metrics = json.loads((folder / "metrics.json").read_text())
        made[name] = Bert.load(folder).state_dict() | {"parameters": torch.tensor(metrics["parameters"])}
    assert made["some"].keys() == made["all"].keys()
    for name, tensor in made["some"].items():
        assert torch.allclose(tensor, made["all"][name], rtol=1e-5, atol=1e-6), name
    after = made["some"]["word_embeddings.weight"]
    assert left_out and ((after / before)[left_out] < 0.99).all()


def test_a_kill_between_the_files_of_an_epoch_does_not_mix_two_epochs(tiny, tmp_path, monkeypatch):
    """The weights of the third epoch, the best, are written and its state is not. Run again, it is not the best."""
    flags = ["--task", "bbc", "--model", tiny, "--ticket", "none", "--max-length", 8, "--train-rows", 64]
    flags += ["--output", tmp_path, "--epochs", 3]
    accuracies, write, seen = iter([0.4, 0.6, 0.9, 0.5, 0.1]), our_safetensors.write_safetensors, []

    def made_up(model, *_):
        seen.append(model.classifier.weight.detach().clone())
        return next(accuracies)

    def killed(path, tensors, metadata):
        if len(metadata.get("scores", ())) == 3:
            raise KeyboardInterrupt
        write(path, tensors, metadata)

    monkeypatch.setattr(finetune, "accuracy", made_up)
    with monkeypatch.context() as patched:
        patched.setattr(our_safetensors, "write_safetensors", killed)
        patched.setattr(runs, "peak_memory", lambda device: 1e15)
        assert call(finetune, *flags) == 130
    assert call(finetune, *flags) == 0
    folder = tmp_path / "tiny" / "bbc" / "none-vanilla-seed0"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["best_epoch"], metrics["validation_accuracy"], metrics["peak_memory"]) == (2, 0.6, 1e15)
    assert torch.equal(Bert.load(folder).classifier.weight, seen[1]) and len(seen) == 5
    assert {path.name for path in folder.iterdir() if "state" in path.name} <= {"finetune.state.safetensors.lock"}


def test_files_are_identified_by_content_not_by_path(tiny, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(tiny, tmp_path / "model")
    c = {"head": torch.rand(2, 3), "ffn": torch.rand(2, 40)}
    masks = dict(zip(("head", "ffn"), gates.draw_masks(*c.values(), 1 / 6, 0.2)))
    metadata = {"script": "draw.py", "model_sha256": files.sha256(model / "model.safetensors"), "settings": {}}
    our_safetensors.write_safetensors(tmp_path / "ticket.safetensors", masks, metadata)
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "bbc", "--model", "model", "--output", "out", "--epochs", "1", "--max-length", 8]
    flags += ["--train-rows", 32, "--ticket"]
    for ticket in ("ticket.safetensors", "./ticket.safetensors", tmp_path / "ticket.safetensors"):
        assert call(finetune, *flags, ticket) == 0
    assert call(finetune, *flags, "none") == 0
    change(model, hidden_dropout_prob=0.5)
    assert call(finetune, *flags, "none") == 2 and "(another config)" in capsys.readouterr().err
    assert files.task_folder("out/..") == tmp_path.name and files.task_folder("imdb") == "imdb"


def test_the_ablations_keep_the_structure_or_the_weights(tiny, tmp_path, capsys):
    c = {"head": torch.randn(2, 3), "ffn": torch.randn(2, 40)}
    masks = gates.draw_masks(c["head"], c["ffn"], 1 / 6, 0.3)
    model = Bert.load(tiny, num_labels=5)
    redrawn = finetune.reinitialize_pruned(model, *masks)
    kept = model.pruned(*masks), redrawn.pruned(*masks)
    for a, b in zip(*(part.state_dict().values() for part in kept)):
        assert torch.equal(a, b)
    inverse = ~masks[0], ~masks[1]
    pruned = [part.pruned(*inverse).state_dict() for part in (model, redrawn)]
    for name in ("intermediate.weight", "output.weight", "query_key_value.weight"):
        for layer in (0, 1):
            a, b = (state[f"layers.{layer}.{name}"] for state in pruned)
            assert a.numel() == 0 or not torch.equal(a, b)
    metadata = {"script": "draw.py", "model_sha256": data.find_model(str(tiny))[1], "settings": {}}
    our_safetensors.write_safetensors(tmp_path / "ticket.safetensors", {"head": masks[0], "ffn": masks[1]}, metadata)
    flags = ["--task", "bbc", "--model", tiny, "--output", tmp_path, "--max-length", "8", "--epochs", "1"]
    flags += ["--ticket", tmp_path / "ticket.safetensors", "--learning-rate", "1e-9", "--precision", "fp32"]
    sizes = {}
    for ablation in ("no-initialization", "no-structure"):
        assert call(finetune, *flags, "--ablation", ablation) == 0
        folder = tmp_path / "tiny" / "bbc" / f"ticket-vanilla-{ablation}-seed0"
        sizes[ablation] = Bert.load(folder)
    full = Bert.load(tiny)
    assert sizes["no-initialization"].config.neurons == tuple(masks[1].sum(1).tolist())
    kept, drawn = sizes["no-initialization"], sizes["no-initialization"].layers[1]
    for name in ("word_embeddings", "position_embeddings", "embedding_norm"):  # as in EarlyRobust's code
        torch.testing.assert_close(kept.get_submodule(name).weight, full.get_submodule(name).weight, atol=1e-4, rtol=0)
    for norm in ("attention_norm", "output_norm"):
        old = full.layers[1].get_submodule(norm).weight
        torch.testing.assert_close(drawn.get_submodule(norm).weight, old, atol=1e-4, rtol=0)
    for linear in (drawn.query_key_value, drawn.attention_output, drawn.intermediate, drawn.output, kept.pooler):
        assert linear.bias.abs().max() < 1e-4 and 0.25 < linear.weight.std() < 0.35  # tiny's initializer_range is 0.3
    assert not sizes["no-structure"].config.is_pruned
    torch.testing.assert_close(
        sizes["no-structure"].word_embeddings.weight, full.word_embeddings.weight, atol=1e-4, rtol=0
    )
    assert call(finetune, *flags[:-4], "--ticket", "none", "--ablation", "no-structure") == 2
    assert "needs a ticket, not --ticket none" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["pgd", "infobert"])
def test_every_method_trains_resumes_and_reports_its_cost(tiny, tmp_path, method):
    flags = ["--task", "bbc", "--model", tiny, "--ticket", "none", "--max-length", "8", "--epochs", "2"]
    flags += ["--precision", "fp32", "--train-rows", "100", "--method", method]
    assert call(finetune, *flags, "--output", tmp_path / "whole") == 0
    original = our_safetensors.write_safetensors

    def interrupted(path, *rest):
        original(path, *rest)
        if path.name == "finetune.state.safetensors":
            raise KeyboardInterrupt

    with unittest.mock.patch.object(our_safetensors, "write_safetensors", interrupted):
        assert call(finetune, *flags, "--output", tmp_path / "killed") == 130
    assert call(finetune, *flags, "--output", tmp_path / "killed") == 0
    files = [tmp_path / run / "tiny" / "bbc" / f"none-{method}-seed0" for run in ("whole", "killed")]
    assert files[0].joinpath("model.safetensors").read_bytes() == files[1].joinpath("model.safetensors").read_bytes()
    metrics = json.loads((files[0] / "metrics.json").read_text())
    assert metrics["settings"]["adv_lr"] == {"pgd": 0.03, "infobert": 0.04}[method]
    tokens_ = metrics["tokens_per_second"] * metrics["seconds"]
    assert 2 * 100 * 3 <= round(tokens_) <= 2 * 100 * 8 and metrics["peak_memory"] > 1e8


@pytest.mark.slow
def test_the_full_minilm_reaches_84_percent_on_rt_within_three_epochs(tmp_path):
    assert call(finetune, "--task", "rt", "--ticket", "none", "--epochs", "3", "--output", tmp_path) == 0
    metrics = json.loads((tmp_path / "minilm" / "rt" / "none-vanilla-seed0" / "metrics.json").read_text())
    assert metrics["test_accuracy"] >= 0.84


def test_ticket_seed_draws_a_random_ticket_apart_from_the_seed_of_training(tmp_path):
    path, config = (
        tmp_path / "ticket.safetensors",
        Config(num_hidden_layers=2, num_attention_heads=3, intermediate_size=40),
    )
    masks = {"head": torch.ones(2, 3, dtype=torch.bool), "ffn": torch.ones(2, 40, dtype=torch.bool)}
    settings = {"task": "rt", "tau_head": 1 / 6, "tau_ffn": 0.3}
    our_safetensors.write_safetensors(path, masks, {"script": "draw.py", "settings": settings, "model_sha256": "f00"})

    def ticket(**options):
        return find_ticket(finetune.Options(ticket="random", **options), path, "f00", config)[0]

    assert all(torch.equal(*pair) for pair in zip(ticket(seed=3), ticket(seed=5, ticket_seed=3)))
    assert not torch.equal(ticket(seed=3)[1], ticket(seed=3, ticket_seed=4)[1])
    names = {files.run_name(finetune.Options(ticket="random", ticket_seed=seed)) for seed in (None, 0, 1)}
    assert len(names) == 3
    with pytest.raises(BadInput, match="--ticket-seed 0 is for --ticket random, not none"):
        find_ticket(finetune.Options(ticket="none", ticket_seed=0), path, "f00", config)
