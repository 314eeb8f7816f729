"""What attacks draw on beside the model that they attack: synonyms, sentence vectors, a masked language model.

Each is what it is in the papers where that is at hand, and else something that needs no network; `description` says
which, and what the paper has instead. Texts go in, numbers and words come out; TextAttack is not needed here.
"""

import heapq
import itertools
import math
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
from bert import Bert
from inputs.batches import TokenizedSplit, length_sorted_batches
from inputs.tokenizer import Tokenizer
from runtime import cli, files
from runtime.cli import BadInput
from runtime.device import autocast

PAPERS = "the papers': counter-fitted Paragram-SL999, cosine"
TABLE = Path(__file__).with_name("synonyms.npz")  # counterfit.py made it


# ------------------------------------------------------------------------------------------------- texts in batches


class Texts:
    """A model that reads texts: they are tokenized, sorted by length, padded to the longest of their batch.

    The same tokens are computed once, also when they come again: words misspelled in several ways are often the same
    tokens. That saves time, and as they come out equal to the bit, no rounding error chooses among them.
    """

    def __init__(self, model, tokenizer, max_length, device, dtype, batch_size=64):
        self.model, self.tokenizer, self.max_length = model.to(device).eval(), tokenizer, max_length
        self.device, self.dtype, self.batch_size, self.known = device, dtype, batch_size, {}

    @torch.inference_mode()
    def each(self, texts, compute):
        """compute(ids (B, T), mask (B, T) or None, segments) -> (B, ...), for texts or tuples of two: (n, ...) float32,
        in their order, on the CPU."""
        rows = [(text if isinstance(text, tuple) else (text,), 0) for text in texts]
        rows = TokenizedSplit(self.tokenizer, rows, self.max_length, self.device, cached=False)
        ends, lengths, flat = rows.ends.tolist(), rows.lengths.tolist(), rows.ids.numpy()
        keys = [(flat[end - n : end].tobytes(), second) for end, n, second in zip(ends, lengths, rows.second.tolist())]
        if len(self.known) > 10_000:
            self.known.clear()
        first = {key: number for number, key in enumerate(keys) if key not in self.known}
        new = np.array(list(first.values()), dtype=np.int64)
        for chosen in length_sorted_batches(rows.lengths.numpy()[new], self.batch_size, None) if len(new) else ():
            ids, mask, segments, _ = rows.batch(torch.from_numpy(new[chosen]))
            with autocast(self.device, self.dtype):
                found = compute(ids.to(self.device), *(t if t is None else t.to(self.device) for t in (mask, segments)))
            self.known |= zip((keys[number] for number in new[chosen]), found.float().cpu())
        return torch.stack([self.known[key] for key in keys])


class Classifier(Texts):
    """Texts -> logits (n, labels) float32: what TextAttack asks of the model under attack."""

    def __call__(self, texts):
        return self.each(texts, self.model.class_logits)


class Encoder(Texts):
    """Texts -> unit vectors (n, d): the mean of all-MiniLM-L6-v2's last states, as sentence-transformers has it."""

    description = "all-MiniLM-L6-v2, mean of its states (the papers': Universal Sentence Encoder)"

    def __init__(self, device, dtype):
        path, _ = data.find_model("minilm")
        super().__init__(Bert.load(path, num_labels=0), Tokenizer(path), 256, device, dtype)

    def __call__(self, texts):
        return self.each(texts, self.mean_state)

    def mean_state(self, ids, mask, segments):
        states = self.model(ids, mask, segments).float()  # (B, T, d)
        present = torch.ones_like(ids) if mask is None else mask
        total = (states * present[:, :, None]).sum(1)  # (B, d): the mean, but for a factor that the next line takes out
        return torch.nn.functional.normalize(total)


# --------------------------------------------------------------------------------------------------------- synonyms


@dataclass
class Synonyms:
    """Nearest neighbours among counter-fitted word vectors (Mrksic et al. 2016)."""

    description: str
    words: list  # (n,)
    neighbours: list  # of each word: the numbers of the words nearest to it, itself first
    vectors: np.ndarray | None  # (n, d) float32, from which cosines follow
    cosines: dict | None = None  # {(number, number): cosine} of neighbours, where there are no vectors

    def cosine(self, a, b):
        """Of two numbers; 0 where they are no neighbours."""
        return 1.0 if a == b else self.cosines.get((a, b), 0.0)


def find_synonyms(name):
    """The Synonyms `name`: embedded, textattack (its cache), or an .npz file; None: TextAttack's where they are there.

    Raises BadInput where they are not there or have another shape.
    """
    cache = Path(os.environ.get("TA_CACHE_DIR") or Path.home() / ".cache" / "textattack")
    cache = cache / "word_embeddings" / "paragramcf"
    if name is None:
        name = "textattack" if (cache / "nn.npy").is_file() else "embedded"
    if name == "textattack":
        return textattacks_synonyms(cache)
    path = TABLE if name == "embedded" else Path(name)
    try:
        with np.load(path) as file:  # never unpickles
            table = {key: file[key] for key in file.files}
        words, neighbours, similarity = table["words"].tolist(), table["neighbours"], table["similarity"]
        vectors = table["vectors"].astype(np.float32) if "vectors" in table else None
        shapes = [np.shape(words), np.shape(vectors)[:1] or np.shape(words), neighbours.shape[:1], similarity.shape[:1]]
        if len(set(shapes)) > 1 or neighbours.shape != similarity.shape or neighbours.ndim != 2:
            raise ValueError("words (n,), neighbours (n, k), similarity (n, k), vectors (n, d) do not agree")
        if not isinstance(words[0], str) or neighbours.min() < -1 or not 0 <= neighbours.max() < len(words):
            raise ValueError("words must be texts, neighbours their numbers")
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise BadInput(f"--vectors {name} is no table of word vectors: {cli.one_line(error)}") from None
    rows = [[number, *(n for n in row if n >= 0)] for number, row in enumerate(neighbours.tolist())]
    if vectors is None:
        at = np.argwhere(neighbours >= 0)
        keys = zip(at[:, 0].tolist(), neighbours[neighbours >= 0].tolist())
        cosines = dict(zip(keys, similarity[neighbours >= 0].astype(np.float32).tolist()))
        cosines |= {(b, a): cosine for (a, b), cosine in cosines.items()}
        least = f"cosine >= {min(cosines.values()):.2f}"
        whose = f"sha256 {files.sha256(path)[:8]}" if path != TABLE else "GloVe 50d counter-fitted"
        description = f"{path.name}, {len(words):,} words, {whose}, {least} ({PAPERS} >= 0.5)"
        return Synonyms(description, words, rows, None, cosines)
    return Synonyms(
        f"{path.name}, {len(words):,} words, sha256 {files.sha256(path)[:8]} ({PAPERS} >= 0.5)", words, rows, vectors
    )


def textattacks_synonyms(folder):
    """Those that TextAttack has fetched: the papers' own."""

    class Plain(pickle.Unpickler):
        """Builds dictionaries, texts and numbers, and calls nothing."""

        def find_class(self, module, name):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    try:
        with open(folder / "wordlist.pickle", "rb") as file:
            number = Plain(file).load()
        neighbours, vectors = np.load(folder / "nn.npy"), np.load(folder / "paragram.npy")
        words = sorted(number, key=number.get)
        if not len(words) == len(neighbours) == len(vectors) or [number[word] for word in words] != list(
            range(len(words))
        ):
            raise ValueError("its files do not belong together")
    except (OSError, ValueError, EOFError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        how = "TextAttack fetches it: WordEmbedding.counterfitted_GLOVE_embedding(); or --vectors embedded"
        raise BadInput(f"{folder} is not TextAttack's table: {cli.one_line(error)}; {how}") from None
    return Synonyms("TextAttack's, counter-fitted Paragram-SL999", words, neighbours, vectors)


# --------------------------------------------------------------------------------------------- masked language model


class MaskedWords:
    """BERT-Attack's substitutes for a word (Li et al. 2020), as TextAttack's WordSwapMaskedLM finds them, without its
    padding to 512 tokens and without its k^n combinations.

    A word that is one token has the k tokens that the masked language model finds likeliest in its place, where the
    word stands unmasked. A word of n tokens has combinations of the k likeliest for each. TextAttack computes their
    perplexities and means to sort by them, but does not: its k are the first in the order of a nested loop.
    ranking: "loop", as it does, or "perplexity", as it means to.
    """

    def __init__(self, model, tokenizer, k, ranking, device, dtype):
        self.model, self.tokenizer, self.k, self.ranking = model.to(device).eval(), tokenizer, k, ranking
        self.device, self.dtype = device, dtype
        self.last, self.top = None, None

    def __call__(self, text, masked_text, word, count_words, is_first):
        """The substitutes for `word`, at most k. masked_text: `text` with [MASK] in its place; count_words: how many
        words TextAttack sees in a string, since a substitute has to be one."""
        encode, name_of = self.tokenizer.library.encode, self.tokenizer.library.id_to_token
        masked = self.cut(encode(masked_text).ids)
        if self.tokenizer.mask not in masked:  # it was cut off
            return []
        start = masked.index(self.tokenizer.mask)
        stop = start + len(encode(word, add_special_tokens=False).ids)
        places = range(start, min(stop, self.model.config.max_length))
        ids, scores = self.likeliest(text, places.stop)
        columns = [[name_of(i) for i in ids[place]] for place in places]
        if len(places) == 1:
            return [name for name in columns[0] if count_words(name) == 1 and not self.is_piece(name, is_first)]
        if self.ranking == "loop":
            candidates = in_loop_order(columns, count_words)
        else:
            joined = ("".join(names).replace("##", "") for names in best_first(columns, [scores[p] for p in places]))
            candidates = (name for name in joined if count_words(name) == 1)
        return list(itertools.islice(candidates, self.k))

    def cut(self, ids):
        """A text's tokens, no more than the model reads."""
        longest = self.model.config.max_length
        return ids if len(ids) <= longest else ids[: longest - 1] + ids[-1:]

    def is_piece(self, name, is_first):
        """Whether a token only goes on a word."""
        if self.tokenizer.family == "bert":
            return "##" in name
        return not is_first and not name.startswith("Ġ")

    @torch.inference_mode()
    def likeliest(self, text, length):
        """(ids, logits) of the k likeliest tokens at each place, as lists, at least at `length` places."""
        if self.last != text or len(self.top[0]) < length:
            ids = self.cut(self.tokenizer.library.encode(text).ids)
            present = torch.arange(max(len(ids), length)) < len(ids)
            ids = torch.tensor([ids + [self.tokenizer.pad] * (len(present) - len(ids))], device=self.device)
            mask = None if present.all() else present[None].to(self.device)
            with autocast(self.device, self.dtype):
                logits = self.model.mlm_logits(self.model(ids, mask)[0]).float()  # (T, V)
            values, top = logits[:, : self.tokenizer.size].topk(self.k)  # a model may have room for more tokens
            self.last, self.top = text, (top.tolist(), values.tolist())
        return self.top


def in_loop_order(columns, count_words, begun=""):
    """The combinations of one entry a column that are one word, as nested loops meet them. What has begun with two
    words stays two, whatever follows, and is left at once; only Chinese is segmented anew with every character."""
    name = begun.replace("##", "")
    if not columns:
        if count_words(name) == 1:
            yield name
    elif count_words(name) < 2 or re.search("[\u4e00-\u9fff]", name):
        for piece in columns[0]:
            yield from in_loop_order(columns[1:], count_words, begun + piece)


def best_first(columns, scores):
    """The combinations of one entry a column, those with the largest sum of scores first; each column's scores fall.

    The best successors of a combination each go one step down in one column, so that a heap of few suffices.
    """
    start = (0,) * len(columns)
    heap, seen = [(-sum(column[0] for column in scores), start)], {start}
    while heap:
        _, places = heapq.heappop(heap)
        yield tuple(column[place] for column, place in zip(columns, places))
        for i, place in enumerate(places):
            after = places[:i] + (place + 1,) + places[i + 1 :]
            if place + 1 < len(columns[i]) and after not in seen:
                seen.add(after)
                heapq.heappush(heap, (-math.fsum(column[p] for column, p in zip(scores, after)), after))
