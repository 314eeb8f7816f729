"""The example forks of docs/forks.md: each patch applies to a copy of the project, runs, and does what it says. The
lines for a notebook in docs/forks.md run as they stand there."""

import importlib
import io
import re
import shutil
import subprocess
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers

from baselines.robustt import Gates
from bert import Bert
from checkpoints import safetensors
from gates import draw_masks
from tests import conftest
from tests.conftest import HERE, VOCABULARY, call, inputs, one_step, quick_search, saved

PATCHES = {path.stem: path for path in sorted((HERE / "forks").glob("*.patch"))}
DOCUMENT = HERE / "docs" / "forks.md"


@pytest.fixture
def forked(tmp_path, monkeypatch):
    """A function of (name of a patch, *modules) that returns these modules of a copy of the project with the patch."""
    root = tmp_path / "fork"
    for path in [*HERE.glob("*.py"), *HERE.glob("[a-z]*/*.py"), *HERE.glob("attacks/*.npz")]:
        target = root / path.relative_to(HERE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    ours = {path.relative_to(root).parts[0].removesuffix(".py") for path in root.rglob("*.py")} - {"tests"}
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ours}

    def load(name, *modules):
        subprocess.run(["git", "apply", PATCHES[name]], cwd=root, check=True)
        for module in before:
            del sys.modules[module]
        monkeypatch.syspath_prepend(root)
        return [importlib.import_module(module) for module in modules]

    yield load
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    sys.modules.update(before)


def coefficients(search, folder, corpus, output, *more):
    """Run a short search. Returns its coefficients and trace."""
    assert call(search, *quick_search(folder, corpus, output)[1:], "--batch-size", 64, *more) == 0
    return safetensors.read_with_metadata(output / folder.name / "coefficients.safetensors")[0]


def drawn(draw, folder, output, *more):
    """Run draw.py. Returns the masks."""
    assert call(draw, "--model", folder, "--output", output, *more) == 0
    masks = safetensors.read_with_metadata(output / folder.name / "rt" / "ticket.safetensors")[0]
    return masks["head"], masks["ffn"]


@pytest.mark.parametrize("name", PATCHES)
def test_a_fork_is_small_and_described(name):
    lines = PATCHES[name].read_text("utf8").splitlines()
    assert sum(line.startswith("+++ ") for line in lines) <= 3
    assert sum(line[:1] in "+-" and line[:4] not in ("+++ ", "--- ") for line in lines if line) <= 40
    assert f"\n### forks/{name}.patch: " in DOCUMENT.read_text("utf8")


def test_every_fork_that_is_described_is_there():
    assert set(re.findall(r"### forks/(\w+)\.patch", DOCUMENT.read_text("utf8"))) == PATCHES.keys()


def test_l0_gates_are_hard_concrete_with_a_learning_rate_of_their_own(forked, tiny, corpus, tmp_path, monkeypatch):
    gates, search, draw = forked("l0_gates", "gates", "search", "draw")
    c = gates.Coefficients(2, 3, 400)
    oracles = Gates((2, 3), 0.5), Gates((2, 400), 0.5)
    for oracle, scores in zip(oracles, (c.head, c.ffn)):
        scores.data.uniform_(-4, 4)
        oracle.scores.data.copy_(scores)
    torch.manual_seed(1)
    found = c.gates
    torch.manual_seed(1)
    for values, oracle in zip(found, oracles):
        torch.testing.assert_close(values, oracle(torch.ones_like(values)))
    expected = 0.3 * 6 * oracles[0].open_share() + 0.2 * 800 * oracles[1].open_share()
    torch.testing.assert_close(c.penalty(0.3, 0.2), expected)
    seen, original = [], search.objective
    monkeypatch.setattr(search, "objective", lambda *of: seen.append(of[2][1].detach()) or original(*of))
    trace = coefficients(search, tiny, corpus, tmp_path)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2]) and not torch.equal(seen[2], seen[3])
    assert (trace["head"] - 2).abs().max() > 0.05 > 20 * 1e-3  # that of theta is 1e-3
    assert [mask.sum() for mask in drawn(draw, tiny, tmp_path)] == [5, 64]


def test_layer_wise_pruning_holds_in_the_stopping_rule_the_drawing_and_the_random_ticket(
    forked, tiny, corpus, tmp_path
):
    gates, search, draw, tickets, bert, finetune = forked(
        "layer_wise", "gates", "search", "draw", "checkpoints.tickets", "bert", "finetune"
    )
    scores = torch.rand(4, 50)
    expected = scores > scores.sort(1).values[:, 14:15]
    assert torch.equal(gates.draw_mask(scores, 0.3), expected)  # prunes 15 of 50
    with pytest.raises(gates.BadInput, match="prunes all 3 heads of a layer: choose at most 2/3"):
        gates.draw_mask(torch.ones(2, 3), 0.9, at_least_one=True)
    stopping = gates.EarlyStopping(1 / 3, 0.3, 0.1, 5)
    stopping.update(torch.rand(2, 3), torch.rand(2, 40))
    coefficients(search, tiny, corpus, tmp_path)
    masks = drawn(draw, tiny, tmp_path, "--tau-head", 1 / 3, "--tau-ffn", 0.3)
    path = tmp_path / tiny.name / "rt" / "ticket.safetensors"
    sha256 = safetensors.read_with_metadata(path)[1]["model_sha256"]
    options = finetune.Options(model=str(tiny), ticket="random", seed=3)
    chance, _ = tickets.find_ticket(options, path, sha256, bert.Config.read(tiny))
    for heads, neurons in (stopping.masks, masks, chance):
        assert heads.sum(1).tolist() == [2, 2] and neurons.sum(1).tolist() == [28, 28]
    assert not torch.equal(masks[1], chance[1])


def test_magnitudes_are_those_of_the_published_weights_and_need_no_search(forked, tiny, tmp_path):
    (draw,) = forked("magnitude", "draw")
    found = drawn(draw, tiny, tmp_path, "--tau-head", 1 / 3)
    head, ffn = torch.zeros(2, 3), torch.zeros(2, 40)
    for i, layer in enumerate(transformers.BertForMaskedLM.from_pretrained(tiny).bert.encoder.layer):
        attention = layer.attention.self
        for j in range(3):
            rows = slice(8 * j, 8 * j + 8)
            weights = [of.weight[rows] for of in (attention.query, attention.key, attention.value)]
            weights.append(layer.attention.output.dense.weight[:, rows])
            head[i, j] = torch.cat([weight.flatten() for weight in weights]).norm()
        for j in range(40):
            ffn[i, j] = torch.cat([layer.intermediate.dense.weight[j], layer.output.dense.weight[:, j]]).norm()
    for mask, expected in zip(found, draw_masks(head, ffn, 1 / 3, 0.2)):
        assert torch.equal(mask, expected)


def test_importance_is_the_absolute_gradient_divided_by_the_layers_norm(forked, tmp_path, corpus, monkeypatch):
    saved(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    search, draw = forked("gradient", "search", "draw")
    monkeypatch.setattr(conftest, "search", search)
    found, batch = one_step(tmp_path / "model", corpus, tmp_path, "--adversary", "vanilla")
    model, gates = Bert.load(tmp_path / "model", mlm=True), (torch.ones(2, 3), torch.ones(2, 40))
    for c in gates:
        c.requires_grad_()
    model.mlm_loss(model(batch.ids, positions=batch.positions, gates=gates), batch.labels).backward()
    for name, c in zip(("head", "ffn"), gates):
        expected = c.grad.abs() / c.grad.square().sum(1, keepdim=True).sqrt()
        torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-3)
    more = coefficients(search, tmp_path / "model", corpus, tmp_path / "more")
    assert len(more["trace.head"]) > 3 and not torch.equal(more["trace.head"][0], more["trace.head"][3])
    assert [mask.sum() for mask in drawn(draw, tmp_path / "model", tmp_path / "more")] == [5, 64]


def test_distilbert_equals_transformers_and_is_searched_and_pruned(forked, corpus, tmp_path):
    """It is also exported, and loaded by transformers again."""
    bert, tokenizer, search, draw = forked("distilbert", "bert", "inputs.tokenizer", "search", "draw")
    load, folder = bert.Bert.load, tmp_path / "tiny"
    sizes = {"vocab_size": len(VOCABULARY), "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40}
    config = transformers.DistilBertConfig(**sizes, initializer_range=0.3, num_labels=3, attn_implementation="eager")
    ids, mask, _ = inputs(transformers.BertConfig(vocab_size=len(VOCABULARY)), 3, 17)
    for kind in (transformers.DistilBertForMaskedLM, transformers.DistilBertForSequenceClassification):
        reference = kind(config).eval()
        reference.save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
        model = load(folder, mlm=kind is transformers.DistilBertForMaskedLM).eval()
        assert model.initialized == model.unused == [] and tokenizer.Tokenizer(folder).family == "bert"
        with torch.no_grad():
            expected = reference(ids, mask.long()).logits
            if model.mlm_head:
                found, expected = model.mlm_logits(model(ids, mask)[mask]), expected[mask]
            else:
                found = model.class_logits(ids, mask)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        if model.mlm_head:
            assert not torch.equal(coefficients(search, folder, corpus, tmp_path)["head"], torch.ones(2, 3))
            masks = drawn(draw, folder, tmp_path)
    model.save(tmp_path / "export", ("a", "b", "c"), {})
    back, report = kind.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(back.eval()(ids, mask.long()).logits, expected, atol=1e-5, rtol=1e-5)
    model.pruned(*masks).save(tmp_path / "pruned", ("a", "b", "c"), {})
    found = load(tmp_path / "pruned").eval().class_logits(ids, mask)
    gates = tuple(mask.float() for mask in masks)
    torch.testing.assert_close(found, model.class_logits(ids, mask, gates=gates), atol=1e-5, rtol=1e-5)


def test_a_task_of_the_hub_is_fetched_and_trained_on(forked, server, tiny, tmp_path):
    data, finetune = forked("mrpc", "data", "finetune")
    for split, rows in (("train", 40), ("validation", 20)):
        texts = {name: [f"{name[-1]} abc {i}" for i in range(rows)] for name in ("sentence1", "sentence2")}
        table, buffer = pyarrow.table(texts | {"label": [i % 2 for i in range(rows)]}), io.BytesIO()
        pyarrow.parquet.write_table(table, buffer)
        server.files[f"mrpc/{split}-00000-of-00001.parquet"] = buffer.getvalue()
    assert data.TASKS["mrpc"].load(None)["test"][1] == (("1 abc 1", "2 abc 1"), 1)
    assert any(f"/nyu-mll/glue/resolve/{data.REVISIONS['nyu-mll/glue']}/mrpc/" in path for _, path, _ in server.seen)
    flags = "--task mrpc --ticket none --epochs 1 --batch-size 20"
    assert call(finetune, *flags.split(), "--model", tiny, "--output", tmp_path) == 0
    config = tmp_path / tiny.name / "mrpc" / "none-vanilla-seed0" / "config.json"
    assert "not_equivalent" in config.read_text()


def test_bae_proposes_what_textattacks_does(forked, tiny, corpus, tmp_path, monkeypatch):
    folder, task = tmp_path / "tiny", tmp_path / "letters.csv"
    reference = saved(folder)
    vocabulary = [str(number) if number < 12 else token for number, token in enumerate(VOCABULARY)]
    (folder / "vocab.txt").write_text("\n".join([*VOCABULARY[:5], *vocabulary[5:]]))  # numbers are no substitutes
    names = ("attacks.library", "attacks.recipes", "attacks.resources", "finetune", "attack")
    library, recipes, resources, finetune, attack = forked("bae", *names)
    monkeypatch.setenv("TA_CACHE_DIR", str(tmp_path / "cache"))
    textattack, nltk_data = library.import_textattack()
    setup = types.SimpleNamespace(
        textattack=textattack,
        nltk_data=nltk_data,
        options=attack.Options(model=str(folder), masked_lm=str(folder), bert_attack_k=50, output=str(tmp_path)),
        victim=types.SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, model=None),
    )
    built = recipes.construct(setup, "BAEGarg2019")
    assert recipes.masked_language_model(setup, built).endswith("k = 50")
    theirs = textattack.transformations.WordSwapMaskedLM(
        method="bae",
        masked_language_model=reference,
        tokenizer=transformers.BertTokenizerFast.from_pretrained(folder),
        max_length=64,
        max_candidates=50,
        min_confidence=0.0,
    )
    text = textattack.shared.AttackedText("xyz no m, q uvw")
    found, expected = (of._get_transformations(text, range(5)) for of in (built.transformation, theirs))
    assert [of.text for of in found] == [of.text for of in expected] and len(found) > 150
    rows = [f"{word} {'abc'[: i % 3]},{i % 2}" for i, word in enumerate(corpus.read_text().split()[:90])]
    task.write_text("text,label\n" + "\n".join(rows))
    common = ["--model", folder, "--output", tmp_path, "--task", task, "--ticket", "none"]
    assert call(finetune, *common, "--epochs", 1) == 0
    more = ["--masked-lm", folder, "--bert-attack-k", 9, "--encoder", "minilm"]
    assert call(attack, *common, "--attack", "bae", "--n", 4, *more) == 0
    assert len((tmp_path / "tiny/letters/none-vanilla-seed0/bae.jsonl").read_text().splitlines()) == 4


def test_the_lines_for_a_notebook_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf8"), re.DOTALL)
    _, lines = code.split("\n\n")
    assert len(lines.splitlines()) <= 10
    assert f"```python\n{lines}```" in (HERE / "README.md").read_text("utf8")
    names = {}
    exec(code, names)
    assert not list(tmp_path.iterdir())  # nothing is written
    head, ffn = names["masks"]
    assert head.shape == (6, 12) and head.sum() == 60 and ffn.sum() == 9216 - 2765
    assert (names["c"].head != 1).all() and names["ticket"].config.heads == tuple(head.sum(1).tolist())
    assert capsys.readouterr().out.count("[") > 6
