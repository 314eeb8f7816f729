"""Texts into batches: rows of a task, blocks of a corpus, padding, masking.

Token ids are kept as one flat int32 array with the rows' ends, in memory and in the cache, so that memory grows with
the tokens alone; those of a corpus stay on disk.
"""

import contextlib
import hashlib
import os
from typing import NamedTuple

import filelock
import numpy as np
import torch

from checkpoints import safetensors
from runtime.cli import BadInput, progress
from runtime.files import atomic_write, cache_folder, sha256

CHUNK = 1000  # texts that are tokenized at a time: an encoding takes a hundred times its ids' memory


class Batch(NamedTuple):
    """Rows of a task, padded to the longest of them. `attention_mask` is None where no row is padded, `segments` where
    all are 0: `Bert` takes both so."""

    ids: torch.Tensor  # (B, T) token ids
    attention_mask: torch.Tensor | None  # (B, T), True at tokens and False at padding
    segments: torch.Tensor | None  # (B, T) 0 in the first text and 1 in the second
    labels: torch.Tensor  # (B,)

    @property
    def token_mask(self):
        """(B, T), 1 at tokens and 0 at padding."""
        return torch.ones_like(self.ids) if self.attention_mask is None else self.attention_mask

    def rows(self, chosen):
        """The rows in the slice `chosen`."""
        return Batch(*(part if part is None else part[chosen] for part in self))


class TokenizedSplit:
    """The rows of a split, tokenized once: [CLS] text [SEP], or [CLS] text [SEP] second text [SEP].

    rows: [(tuple of one or two texts, label number)]. A text longer than max_length tokens is cut; `cut` is how many
    were. `batches` yields a `Batch` at a time. cached: whether the tokens are kept on disk for the next time.
    """

    def __init__(self, tokenizer, rows, max_length, device, cached=True):
        self.pad, self.device = tokenizer.pad, device
        self.labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
        if cached:
            tensors = self.kept(tokenizer, rows, max_length)
        else:
            tensors = encode(tokenizer, [texts for texts, _ in rows], max_length)
        self.ids, self.ends, self.second, self.cut = (tensors[name] for name in ("ids", "ends", "second", "cut"))
        self.lengths = torch.diff(self.ends, prepend=torch.zeros(1, dtype=torch.int64))
        self.has_segments = tokenizer.config.type_vocab_size > 1 and bool((self.second < self.lengths).any())

    def kept(self, tokenizer, rows, max_length):
        """What `encode` makes of the rows, from the cache or into it."""
        path = cache_folder() / "tokens" / f"{texts_digest(tokenizer, rows, max_length).hexdigest()}.safetensors"
        with make_once(path) as missing:
            if missing:
                safetensors.write_safetensors(path, encode(tokenizer, [texts for texts, _ in rows], max_length), {})
        return safetensors.read_safetensors(path)[0]

    def __len__(self):
        return len(self.labels)

    def renumber(self, words):
        """Let each token's id be its place in `words` (n,), ids in order; the padding's is among them."""
        self.ids = torch.searchsorted(words, self.ids.long()).int()
        self.pad = int(torch.searchsorted(words, self.pad))

    def batches(self, batch_size, generator=None):
        for chosen in length_sorted_batches(self.lengths.numpy(), batch_size, generator):
            yield self.batch(torch.from_numpy(chosen))

    def batch(self, chosen):
        """The rows numbered `chosen` (B,), padded to the longest of them."""
        lengths = self.lengths[chosen, None]  # (B, 1)
        columns = torch.arange(int(lengths.max()))
        mask = columns < lengths  # (B, T)
        places = (self.ends[chosen, None] - lengths + columns).clamp(max=len(self.ids) - 1)
        ids = self.ids[places].long().masked_fill(~mask, self.pad)
        segments = (mask & (columns >= self.second[chosen, None])).long() if self.has_segments else None
        parts = ids, None if mask.all() else mask, segments, self.labels[chosen]
        return Batch(*(part if part is None else part.to(self.device) for part in parts))


def texts_digest(tokenizer, rows, max_length):
    """hashlib's object, fed with the rows' texts and what decides which tokens they become."""
    digest = hashlib.sha256(tokenizer.digest.encode() + str(max_length).encode())
    for texts, _ in rows:
        digest.update(len(texts).to_bytes(8, "little"))
        for text in texts:
            encoded = text.encode("utf8")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest


def rows_sha256(tokenizer, max_length, *splits):
    """The sha256 that tells the rows of these splits, with their labels, from others."""
    whole = hashlib.sha256()
    for rows in splits:
        digest = texts_digest(tokenizer, rows, max_length)
        digest.update(np.array([label for _, label in rows], np.int64).tobytes())
        whole.update(digest.digest())
    return whole.hexdigest()


@contextlib.contextmanager
def make_once(path):
    """True where the block is to make `path`; of several processes that want it, one makes it."""
    if path.is_file():  # without the lock, for the cache may be one that cannot be written to
        yield False
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        yield not path.is_file()


def encode(tokenizer, texts, max_length):
    """Tuples of one or two texts -> {"ids": (tokens,) int32, one row after another, "ends": (rows,) int64, "second":
    (rows,) int32, where in its row the second text begins, at the row's end where there is none, "cut": (), how many
    texts were longer than max_length}."""
    ids, lengths, second, cut = [np.zeros(0, np.int32)], [], [], 0
    special = tokenizer.library.num_special_tokens_to_add(any(len(text) > 1 for text in texts))
    if max_length <= special:
        raise BadInput(f"--max-length {max_length} has room for no more than the {special} special tokens")
    tokenizer.library.enable_truncation(max_length)
    try:
        for start in range(0, len(texts), CHUNK):
            chunk = [text[0] if len(text) == 1 else text for text in texts[start : start + CHUNK]]
            for encoding in tokenizer.library.encode_batch_fast(chunk):
                ids.append(np.array(encoding.ids, dtype=np.int32))
                lengths.append(len(ids[-1]))
                second.append(lengths[-1] - sum(encoding.type_ids))
                cut += bool(encoding.overflowing)
            ids = [np.concatenate(ids)]
    finally:
        tokenizer.library.no_truncation()
    return {
        "ids": torch.from_numpy(ids[0]),
        "ends": torch.tensor(lengths, dtype=torch.int64).cumsum(0),
        "second": torch.tensor(second, dtype=torch.int32),
        "cut": torch.tensor(cut),
    }


def length_sorted_batches(lengths, batch_size, generator):
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


class Blocks:
    """A corpus as blocks of tokens: one stream, [SEP] after each document, cut into [CLS] ... [SEP].

    documents: an iterable of texts, read once; size: of them all, in bytes, for the progress bar; key: what tells
    this corpus from others. The stream lies in the cache, as int32, and only the blocks asked for are read: a corpus
    may be larger than the memory. The tokens at the end, fewer than a block, are left out.
    Raises BadInput where there is not one block.
    """

    def __init__(self, tokenizer, documents, size, key, block):
        self.tokenizer, self.block = tokenizer, block
        key = hashlib.sha256(f"{tokenizer.digest} {key}".encode()).hexdigest()
        self.path = cache_folder() / "tokens" / f"{key}.int32"
        with make_once(self.path) as missing:
            if missing:
                with atomic_write(self.path) as tmp_path, open(tmp_path, "wb") as file:
                    for ids in stream(tokenizer, documents, size):
                        file.write(ids)
        self.file = open(self.path, "rb")  # once: whoever clears the cache now does not end a search
        self.tokens = os.path.getsize(self.path) // 4
        self.count = self.tokens // (block - 2)
        if self.count == 0:
            raise BadInput(f"the corpus has {self.tokens} tokens, not enough for one block of {block}")
        self.sha256 = sha256(self.path)

    def __len__(self):
        return self.count

    def rows(self, chosen):
        """The blocks numbered `chosen`, (B, block) int64."""
        ids = np.full((len(chosen), self.block), self.tokenizer.cls, dtype=np.int64)
        for row, number in zip(ids, chosen.tolist()):
            self.file.seek(4 * number * (self.block - 2))
            row[1:-1] = np.fromfile(self.file, np.int32, self.block - 2)
        ids[:, -1] = self.tokenizer.sep
        return torch.from_numpy(ids)

    def frequencies(self, size):
        """How often each of `size` tokens occurs, (size,)."""
        counts = torch.zeros(size, dtype=torch.int64)
        self.file.seek(0)
        while len(ids := np.fromfile(self.file, np.int32, 2**20)):
            counts += torch.bincount(torch.from_numpy(ids).long(), minlength=size)
        return counts


def stream(tokenizer, documents, size):
    """Documents -> arrays of their token ids, int32, [SEP] after each document."""
    bar = progress(size, description="tokens", unit="B")
    chunk, length = [], 0

    def encoded():
        bar.update(sum(len(text.encode("utf8")) for text in chunk))
        for encoding in tokenizer.library.encode_batch_fast(chunk, add_special_tokens=False):
            yield np.array([*encoding.ids, tokenizer.sep], dtype=np.int32)

    for text in documents:
        chunk.append(text)
        length += len(text)
        if length > 2**20:
            yield from encoded()
            chunk, length = [], 0
    yield from encoded()
    bar.close()


def mask_tokens(ids, tokenizer, share=0.15):
    """BERT's masking of ids (B, T): of the tokens that are not special, `share` are to be predicted; 80 % of those
    become [MASK], 10 % a random token, 10 % stay. Returns (masked ids (B, T), positions (n,) into the B T tokens,
    labels (n,)). Draws from torch's random numbers."""
    special = torch.tensor([tokenizer.cls, tokenizer.sep, tokenizer.pad, tokenizer.mask])
    draws = torch.rand(ids.shape).masked_fill_(torch.isin(ids, special), 2).flatten()
    candidates = int((draws < 2).sum())
    count = min(candidates, max(1, round(share * candidates)))
    positions = draws.argsort()[:count].sort().values  # (n,), in order: search.MLM cuts them by rows
    labels = ids.flatten()[positions]
    fate = torch.rand(labels.shape)
    other = torch.randint(tokenizer.size, labels.shape)
    masked = ids.flatten().clone()
    masked[positions] = torch.where(fate < 0.8, tokenizer.mask, torch.where(fate < 0.9, other, labels))
    return masked.view(ids.shape), positions, labels
