"""What attacks use: the model under attack, a sentence encoder, synonyms, a masked language model.

Each is the papers' own if available, or else a replacement that needs no network; its description says which.
"""

import itertools
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from attacks import library
from bert import Bert
from inputs.batches import TokenizedSplit, length_sorted_batches
from inputs.tokenizer import Tokenizer
from runtime import cli, files
from runtime.cli import BadInput
from runtime.device import autocast

PAPERS = "the papers': counter-fitted Paragram-SL999, cosine"
BUNDLED = Path(__file__).with_name("synonyms.npz")  # written by counterfit.py


class TextModel:
    """The model under attack: n texts or pairs -> class logits (n, labels), float32 on the CPU.

    Batches have texts of similar length. Equal token sequences, such as different misspellings of a word, are computed
    once. This saves time, and rounding errors do not choose among them.
    """

    def __init__(self, model, tokenizer, max_length, device, dtype, batch_size=64):
        self.model, self.tokenizer, self.max_length = model.to(device).eval(), tokenizer, max_length
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self.cache = {}  # (token ids, start of the second text) -> result

    @torch.inference_mode()
    def __call__(self, texts):
        rows = [(text if isinstance(text, tuple) else (text,), 0) for text in texts]
        rows = TokenizedSplit(self.tokenizer, rows, self.max_length, self.device, cached=False)
        tokens = np.split(rows.ids.numpy(), rows.ends[:-1].tolist())
        keys = [(ids.tobytes(), second) for ids, second in zip(tokens, rows.second_start.tolist())]
        if len(self.cache) > 10_000:
            self.cache.clear()
        number_of = {key: number for number, key in enumerate(keys) if key not in self.cache}
        new = list(number_of.values())
        for chosen in length_sorted_batches(rows.lengths[new], self.batch_size, None) if new else []:
            numbers = [new[i] for i in chosen]
            ids, mask, segments, _ = rows.batch(torch.tensor(numbers))
            with autocast(self.device, self.dtype):
                results = self.forward(ids, mask, segments)
            self.cache |= zip((keys[number] for number in numbers), results.float().cpu())
        return torch.stack([self.cache[key] for key in keys])

    def forward(self, ids, mask, segments):
        """ids (B, T), mask and segments (B, T) or None -> (B, ...)."""
        return self.model.class_logits(ids, mask, segments)


class SentenceEncoder(TextModel):
    """all-MiniLM-L6-v2 with mean pooling, as in sentence-transformers: n texts -> unit vectors (n, d)."""

    description = "all-MiniLM-L6-v2, mean of its states (the papers': Universal Sentence Encoder)"

    def __init__(self, device, dtype):
        path, _ = data.find_model("minilm")
        super().__init__(Bert.load(path, num_labels=0), Tokenizer(path), 256, device, dtype)

    def forward(self, ids, mask, segments):
        states = self.model(ids, mask, segments).float()  # (B, T, d)
        if mask is not None:
            states = states * mask[:, :, None]
        return F.normalize(states.sum(1))  # (B, d); the mean has the same direction


@dataclass
class Synonyms:
    """Nearest neighbours among counter-fitted word vectors (Mrksic et al. 2016)."""

    description: str
    words: list
    neighbours: list  # for each word the numbers of its nearest words, itself first
    vectors: np.ndarray | None = None  # (n, d) float32
    cosines: dict | None = None  # {(number, number): cosine} of neighbours, if there are no vectors

    def cosine(self, a, b):
        """The cosine of two word numbers, 0 if they are not neighbours."""
        return 1.0 if a == b else self.cosines.get((a, b), 0.0)


def find_synonyms(name):
    """Load Synonyms: "bundled", "textattack" (from its cache: the papers' own), an .npz file (see counterfit.py),
    or None for TextAttack's if cached and else the bundled. Raises BadInput if they are missing or malformed."""
    cache = library.cache_folder() / "word_embeddings" / "paragramcf"
    is_cached = name == "textattack" or name is None and (cache / "nn.npy").is_file()
    try:
        if is_cached:
            return cached_synonyms(cache)
        return npz_synonyms(BUNDLED if name in (None, "bundled") else Path(name))
    except Exception as error:  # numpy, pickle, zipfile and zlib each raise their own
        remedy = "; TextAttack fetches it: WordEmbedding.counterfitted_GLOVE_embedding()" if is_cached else ""
        reason = cli.one_line(error) + remedy
        raise BadInput(f"--vectors {name or 'textattack'} is no table of word vectors: {reason}") from None


def npz_synonyms(path):
    """Synonyms of a file as counterfit.py writes it."""
    with np.load(path) as table:  # does not unpickle
        words, neighbours, similarity = table["words"].astype(str).tolist(), table["neighbours"], table["similarity"]
    if similarity.shape != neighbours.shape or len(words) != len(neighbours):
        raise ValueError("words (n,), neighbours (n, k), similarity (n, k) do not agree")
    if neighbours.min() < -1 or not 0 <= neighbours.max() < len(words):
        raise ValueError("neighbours must be numbers of words, or -1")
    is_pair = neighbours >= 0  # False where a row is filled up with -1
    a, b = is_pair.nonzero()[0].tolist(), neighbours[is_pair].tolist()
    values = similarity[is_pair].astype(np.float32).tolist()
    cosines = dict(zip(zip(a, b), values)) | dict(zip(zip(b, a), values))
    rows = [[number, *row[row >= 0].tolist()] for number, row in enumerate(neighbours)]
    origin = "GloVe 50d counter-fitted" if path == BUNDLED else f"sha256 {files.sha256(path)[:8]}"
    description = f"{path.name}, {len(words):,} words, {origin}, cosine >= {min(values):.2f} ({PAPERS} >= 0.5)"
    return Synonyms(description, words, rows, cosines=cosines)


def cached_synonyms(folder):
    """Synonyms from TextAttack's cache."""

    class SafeUnpickler(pickle.Unpickler):  # reads dictionaries, strings and numbers
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    with open(folder / "wordlist.pickle", "rb") as file:
        number_of = SafeUnpickler(file).load()
    neighbours, vectors = np.load(folder / "nn.npy"), np.load(folder / "paragram.npy")
    if sorted(number_of.values()) != list(range(len(neighbours))) or len(neighbours) != len(vectors):
        raise ValueError("its files do not belong together")
    words = sorted(number_of, key=number_of.get)
    return Synonyms("TextAttack's, counter-fitted Paragram-SL999", words, neighbours, vectors)


class MaskedWords:
    """BERT-Attack's substitutes for a word (Li et al. 2020), equal to those of TextAttack's WordSwapMaskedLM.

    For a word of one token they are the k tokens that the masked language model finds most likely in its place, with
    the word unmasked; for a word of n tokens, the first k combinations of the k most likely per token, in the order of
    a nested loop. (TextAttack computes their perplexities too, but does not order them by it.)
    """

    def __init__(self, model, tokenizer, k, device, dtype):
        self.model, self.tokenizer, self.k = model.to(device).eval(), tokenizer, k
        self.device, self.dtype = device, dtype
        tokenizer.library.enable_truncation(model.config.max_length)
        self.last_text, self.last_top = None, None

    def __call__(self, text, masked_text, word, count_words, is_first):
        """At most k substitutes for `word` in `text`, each a single word by `count_words`, TextAttack's word count.

        masked_text: `text` with [MASK] in place of the word. is_first: whether the word is the first of the text.
        """
        encode, token_of = self.tokenizer.library.encode, self.tokenizer.library.id_to_token
        masked = encode(masked_text).ids
        if self.tokenizer.mask not in masked:  # truncated
            return []
        start = masked.index(self.tokenizer.mask)
        end = min(start + len(encode(word, add_special_tokens=False).ids), self.model.config.max_length)
        columns = [[token_of(i) for i in row] for row in self.predict(text, end)[start:end]]  # k tokens per position
        if len(columns) == 1:
            return [token for token in columns[0] if count_words(token) == 1 and not self.is_suffix(token, is_first)]
        return list(itertools.islice(in_loop_order(columns, count_words), self.k))

    def is_suffix(self, token, is_first):
        """Whether a token can only continue a word."""
        if self.tokenizer.family == "bert":
            return "##" in token
        return not is_first and not token.startswith("Ġ")

    @torch.inference_mode()
    def predict(self, text, length):
        """The ids of the k most likely tokens at each position, as lists, for at least `length` positions."""
        if self.last_text != text or len(self.last_top) < length:
            ids = self.tokenizer.library.encode(text).ids
            padding = max(0, length - len(ids))
            mask = torch.tensor([[True] * len(ids) + [False] * padding], device=self.device) if padding else None
            ids = torch.tensor([ids + [self.tokenizer.pad] * padding], device=self.device)  # (1, T)
            with autocast(self.device, self.dtype):
                logits = self.model.mlm_logits(self.model(ids, mask)[0]).float()  # (T, V)
            top = logits[:, : self.tokenizer.size].topk(self.k).indices  # the model may have more rows than tokens
            self.last_text, self.last_top = text, top.tolist()
        return self.last_top


def in_loop_order(columns, count_words, prefix=""):
    """Yield the combinations of one token per column that are a single word, in the order of nested loops.

    A prefix of two words is abandoned, since it never becomes one word again, except in Chinese.
    """
    word = prefix.replace("##", "")
    if not columns:
        if count_words(word) == 1:
            yield word
    elif count_words(word) < 2 or re.search("[\u4e00-\u9fff]", word):
        for token in columns[0]:
            yield from in_loop_order(columns[1:], count_words, prefix + token)
