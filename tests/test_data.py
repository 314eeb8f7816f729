"""data.py and inputs/tables.py: bundled and hub tasks, custom files, corpora, and what identifies rows."""

import io
import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import data
from inputs.batches import TokenizedSplit, rows_sha256
from inputs.tokenizer import Tokenizer
from runtime import files
from runtime.cli import BadInput
from tests.conftest import LARGE


@pytest.mark.parametrize("name, rows", [("rt", 8530), ("bbc", 2225), ("imdb-bundled", 25000)])
def test_splits_are_fixed_disjoint_tenths(name, rows):
    first, second = (data.TASKS[name].load(None) for _ in range(2))
    assert first == second and sum(map(len, first.values())) == rows
    assert len(first["test"]) == math.ceil(rows / 10)
    assert len(first["validation"]) == pytest.approx(0.09 * rows, abs=1)
    assert {label for _, label in first["train"]} == set(range(len(data.TASKS[name].labels)))


def test_bundled_weights_must_have_the_published_sha256(tmp_path, monkeypatch):
    assert data.find_model("minilm")[1] == data.BUNDLED["minilm"][2]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(data, "package_folder", lambda package: tmp_path)
    with pytest.raises(BadInput, match="has sha256 .* not 53aa5117"):
        data.find_model("minilm")


COLUMNS = {"sst2": ["sentence"], "qnli": ["question", "sentence"], "qqp": ["question1", "question2"]}


COLUMNS |= {"imdb": ["text"], "agnews": ["text"]}


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
    revisions = {path.split("/resolve/")[1].split("/")[0] for _, path, _ in server.seen if "/resolve/" in path}
    assert len(revisions) == 1 and revisions <= set(data.REVISIONS.values())
    data.TASKS[name].load("main")
    assert any("/resolve/main/" in path for _, path, _ in server.seen)


def test_invalid_label_in_a_parquet_file_is_an_error_with_its_row(server):
    serve_task(server, "sst2", label=[0, 1, -1, *[0] * 27])
    with pytest.raises(BadInput, match="parquet row 2 has label -1"):
        data.TASKS["sst2"].load(None)


def test_file_that_is_not_parquet_is_an_error(server):
    server.files["sst2/train-00000-of-00001.parquet"] = LARGE
    server.files["wikitext-2-raw-v1/train-00000-of-00001.parquet"] = LARGE
    for load in (lambda: data.TASKS["sst2"].load(None), lambda: data.find_corpus("wikitext-2-raw-v1")):
        with pytest.raises(BadInput, match="is not a parquet file with"):
            load()


def test_null_text_in_a_parquet_file_is_an_empty_text(server):
    serve_task(server, "qqp", question1=["a", None, *"b" * 28])
    assert data.TASKS["qqp"].load(None)["test"][1][0][0] == ""


CUSTOM = {
    "mine.csv": 'text,label\n"a, b\nc",yes\nd,no\n\ne,yes\n',
    "mine.tsv": 'label\ttext\nyes\ta, b "c\nno\td\nyes\te\n',
    "mine.jsonl": '{"text": "a", "label": true, "n": 1}\n\n{"text": "d", "label": false}\n{"label": true, "text": "e"}',
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_file_is_a_task(tmp_path, name):
    (tmp_path / name).write_text(CUSTOM[name])
    task = data.find_task(str(tmp_path / name))
    assert task.labels == (("False", "True") if "json" in name else ("no", "yes"))
    splits = task.load(None)
    rows = [splits["test"][0], splits["validation"][0], *splits["train"]]
    first = {"mine.csv": "a, b\nc", "mine.tsv": 'a, b "c', "mine.jsonl": "a"}[name]
    assert sorted(rows) == sorted([((first,), 1), (("d",), 0), (("e",), 1)])


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
    for split, rows in (("train", 20), ("test", 5)):
        lines = [json.dumps({"q": f"{split} {i}", "a": "b", "class": i % 12}) for i in range(rows)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    task = data.find_task(str(tmp_path), ("q", "a"), "class")
    assert task.labels == tuple(str(i) for i in range(12))  # sorted as numbers, not 0, 1, 10, 11, 2
    splits = task.load(None)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [18, 2, 5]
    assert splits["test"][3] == (("test 3", "b"), 3)


INVALID = {
    "no label": ("a.csv", b"text,label\na,1\nb,\n", "line 3 has no label"),
    "label null": ("a.jsonl", b'{"text": "a", "label": null}', "line 1 has no label"),
    "no column": ("a.csv", b"text,y\na,1\n", "line 2 has no column 'label', only 'text', 'y'"),
    "column twice": ("a.csv", b"text,label,text\na,1,b\n", "has the column 'text' twice"),
    "too many fields": ("a.csv", b"text,label\na,1\nb,2,3\n", "line 3 has 3 fields, the header 2"),
    "UTF-16": ("a.CSV", "text,label\na,1\n".encode("utf-16-le"), "line 1 has a NUL character: save the file as UTF-8"),
    "a JSON list": ("a.json", b'[\n{"text": "a", "label": 1}\n]', "is one JSON list"),
    "label no word": ("a.jsonl", b'{"text": "a", "label": 1.5}', "1.5 is no word or integer"),
    "not UTF-8": ("a.csv", b"text,label\na,1\n\xff\xfe,2\n", "line 3 is not UTF-8"),
    "not JSON": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', "line 2 is not JSON"),
    "no object": ("a.jsonl", b"1\n", "line 1 is not a JSON object"),
    "text a number": ("a.jsonl", b'{"text": 3, "label": 1}', "line 1 has no text in column 'text'"),
    "nothing": ("a.csv", b"text,label\n", "has no rows"),
    "empty": ("a.csv", b"", "has no rows"),
    "one label": ("a.csv", b"text,label\na,1\nb,1\n", "has no two labels"),
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


def test_two_files_for_one_split_are_an_error_and_other_files_are_ignored(tmp_path):
    for name in ("train.csv", "test.csv", "train.csv.bak"):
        (tmp_path / name).write_text("text,label\na,x\nb,y\n")
    assert len(data.find_task(str(tmp_path)).load(None)["test"]) == 2
    (tmp_path / "train.tsv").write_text("text\tlabel\na\tx\nb\ty\n")
    with pytest.raises(BadInput, match="it has both train.csv and train.tsv"):
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
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfone \xff\ntwo \xef\xbf\xbd\n\n \n")
    assert list(data.find_corpus(tmp_path / "text.txt")[0]) == ["one \ufffd\n", "two \ufffd\n"]
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
    monkeypatch.setattr(files.filelock, "FileLock", None)  # a cached file needs no lock: the cache may be read-only
    assert torch.equal(TokenizedSplit(tokenizer, rows, 16, torch.device("cpu")).ids, made[0].ids)
    with pytest.raises(BadInput, match="--max-length 3 has room for no more than the 3 special tokens"):
        TokenizedSplit(tokenizer, others[1], 3, torch.device("cpu"), cached=False)
