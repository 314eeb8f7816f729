"""Turn texts into batches: task rows, corpus blocks, padding, masking. Tokenized texts are cached."""

import array
import hashlib
import itertools
import os
from typing import NamedTuple

import numpy as np
import torch

from checkpoints import cache, safetensors
from checkpoints.provenance import json_sha256, software
from runtime.cli import BadInput, progress
from runtime.files import atomic_write, sha256
from runtime.optim import seed_step

CHECKSUM = 32  # bytes before the tokens in the cache file of a corpus
CHUNK = 1000  # texts tokenized at a time: the library's encodings take a hundred times the memory of their ids


class Batch(NamedTuple):
    """Rows of a task, padded to the longest of them. Constant masks are None, which saves computation in `Bert`."""

    ids: torch.Tensor  # (B, T) token ids
    attention_mask: torch.Tensor | None  # (B, T), True at tokens and False at padding; None: no padding
    segments: torch.Tensor | None  # (B, T), 0 in the first text and 1 in the second; None: all 0
    labels: torch.Tensor  # (B,)

    @property
    def token_mask(self):
        """(B, T), 1 at tokens and 0 at padding."""
        return torch.ones_like(self.ids) if self.attention_mask is None else self.attention_mask

    def rows(self, chosen):
        """The rows in the slice `chosen`."""
        return Batch(*(part if part is None else part[chosen] for part in self))


class MaskedBatch(NamedTuple):
    """Blocks of a corpus with masked tokens, all of the same length."""

    ids: torch.Tensor  # (B, T) token ids, some replaced
    positions: torch.Tensor  # (n,) of the tokens to predict, indices into the B T tokens, ascending
    labels: torch.Tensor  # (n,) their original ids

    @property
    def token_mask(self):
        """(B, T) ones: there is no padding."""
        return torch.ones_like(self.ids)

    def rows(self, chosen):
        """The rows in the slice `chosen`, their positions counted from its first token."""
        if chosen == slice(0, len(self.ids)):  # without waiting for the GPU
            return self
        length = self.ids.shape[1]
        start, stop = (torch.searchsorted(self.positions, row * length) for row in (chosen.start, chosen.stop))
        positions = self.positions[start:stop] - chosen.start * length
        return MaskedBatch(self.ids[chosen], positions, self.labels[start:stop])


class TokenizedSplit:
    """The tokenized rows of a split: [CLS] text [SEP], or [CLS] text [SEP] second text [SEP].

    rows: [(tuple of one or two texts, label number)]. `num_truncated` counts the rows longer than max_length tokens.
    """

    def __init__(self, tokenizer, rows, max_length, device, cached=True):
        self.pad, self.device = tokenizer.pad, device
        self.labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
        texts = [texts for texts, _ in rows]
        if cached:
            key = cache_key(rows_sha256(tokenizer, max_length, rows))
            path = cache.folder() / "encodings" / f"{key}.safetensors"
            encoding = cache.get(
                path,
                lambda path: read_encoding(path, key),
                lambda path: safetensors.write_safetensors(path, encode(tokenizer, texts, max_length), {"key": key}),
            )
        else:
            encoding = encode(tokenizer, texts, max_length)
        self.ids, self.ends = encoding["ids"], encoding["ends"]
        self.second_start, self.num_truncated = encoding["second_start"], int(encoding["num_truncated"])
        self.lengths = torch.diff(self.ends, prepend=torch.zeros(1, dtype=torch.int64))
        self.has_segments = tokenizer.config.type_vocab_size > 1 and bool((self.second_start < self.lengths).any())

    def __len__(self):
        return len(self.labels)

    def renumber(self, words):
        """Replace each token id by its index in `words` (n,), sorted ids that include the padding's."""
        self.ids = torch.searchsorted(words, self.ids.long()).int()
        self.pad = int(torch.searchsorted(words, self.pad))

    def batches(self, batch_size, generator=None):
        """Yield one `Batch` at a time, in the order of `length_sorted_batches`."""
        return map(self.batch, length_sorted_batches(self.lengths, batch_size, generator))

    def epoch(self, batch_size, seed, epoch):
        """The rows of each step of an epoch, in an order that depends on the seed and the epoch alone."""
        return length_sorted_batches(self.lengths, batch_size, np.random.Generator(np.random.PCG64([seed, epoch])))

    def batch(self, chosen):
        """The rows numbered `chosen` (B,), padded to the longest of them."""
        chosen = torch.as_tensor(chosen)
        lengths = self.lengths[chosen, None]  # (B, 1)
        columns = torch.arange(int(lengths.max()))
        mask = columns < lengths  # (B, T)
        indices = (self.ends[chosen, None] - lengths + columns).clamp(max=len(self.ids) - 1)
        ids = self.ids[indices].long().masked_fill(~mask, self.pad)
        segments = (mask & (columns >= self.second_start[chosen, None])).long() if self.has_segments else None
        parts = ids, None if mask.all() else mask, segments, self.labels[chosen]
        return Batch(*(part if part is None else part.to(self.device) for part in parts))


def encode(tokenizer, texts, max_length):
    """Tokenize tuples of one or two texts. Returns a dictionary of tensors:

    ids: (tokens,) int32, one row after another. ends: (rows,) int64, where each row ends in `ids`.
    second_start: (rows,) int32, where in its row the second text starts; the row's length if there is none.
    num_truncated: (), how many rows were longer than max_length.
    """
    special = tokenizer.library.num_special_tokens_to_add(any(len(text) > 1 for text in texts))
    if max_length <= special:
        raise BadInput(f"--max-length {max_length} leaves no room for text: there are {special} special tokens")
    ids, lengths, second_start, num_truncated = array.array("i"), [], [], 0
    tokenizer.library.enable_truncation(max_length)
    bar = progress(len(texts), description="tokens", unit="text") if len(texts) > CHUNK else None
    for start in range(0, len(texts), CHUNK):
        chunk = [text[0] if len(text) == 1 else text for text in texts[start : start + CHUNK]]
        for encoding in tokenizer.encode_batch(chunk):
            ids.extend(encoding.ids)
            lengths.append(len(encoding))
            second_start.append(lengths[-1] - sum(encoding.type_ids))
            num_truncated += bool(encoding.overflowing)
        if bar:
            bar.update(len(chunk))
    if bar:
        bar.close()
    tokenizer.library.no_truncation()
    return {
        "ids": torch.from_numpy(np.array(ids, dtype=np.int32)),
        "ends": torch.tensor(lengths, dtype=torch.int64).cumsum(0),
        "second_start": torch.tensor(second_start, dtype=torch.int32),
        "num_truncated": torch.tensor(num_truncated),
    }


def cache_key(*inputs):
    """The name of a cache file. It depends on the inputs and on the code that processes them."""
    return json_sha256([inputs, software(__file__)["code"]])


def read_encoding(path, key):
    """The tensors of `encode` in a cache file. Raises BadInput if it is damaged or has another key."""
    tensors, metadata = safetensors.read_with_metadata(path)
    if metadata != {"key": key}:
        raise BadInput(f"{path} holds other rows")
    return tensors


def rows_sha256(tokenizer, max_length, *splits):
    """The sha256 of the rows of these splits, with their labels, as they are tokenized."""
    whole = hashlib.sha256()
    for rows in splits:
        digest = hashlib.sha256(f"{tokenizer.digest}{max_length}".encode())
        for texts, _ in rows:
            digest.update(len(texts).to_bytes(8, "little"))
            for encoded in (text.encode("utf8") for text in texts):
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        digest.update(np.array([label for _, label in rows], np.int64).tobytes())
        whole.update(digest.digest())
    return whole.hexdigest()


def length_sorted_batches(lengths, batch_size, generator):
    """Split the row numbers into arrays of batch_size rows of similar length, which need little padding.

    Rows are shuffled, then sorted by length within pools of 50 batches, and then the batches are shuffled. Without a
    generator, all rows are sorted by length.
    """
    lengths = np.asarray(lengths)
    if generator is None:
        order = np.argsort(lengths, kind="stable")
        return np.split(order, range(batch_size, len(order), batch_size))
    order, batches = generator.permutation(len(lengths)), []
    for pool in np.split(order, range(50 * batch_size, len(order), 50 * batch_size)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += np.split(pool, range(batch_size, len(pool), batch_size))
    return [batches[i] for i in generator.permutation(len(batches))]


class Blocks:
    """A corpus as blocks of tokens: one stream, with [SEP] after each document, split into [CLS] ... [SEP].

    documents: an iterable of texts, read once. size: in bytes, for the progress bar. key: identifies the corpus. The
    stream stays on disk, so a corpus may be larger than memory. The tokens after the last full block are dropped.
    """

    def __init__(self, tokenizer, documents, size, key, block, device="cpu"):
        self.tokenizer, self.block, self.device = tokenizer, block, device
        key = cache_key(tokenizer.digest, key)
        self.file, self.tokens, self.sha256 = cache.get(  # the file stays open: the cache may be cleared meanwhile
            cache.folder() / "tokens" / f"{key}.int32",
            lambda path: open_tokens(path, key),
            lambda path: write_tokens(path, key, token_stream(tokenizer, documents, size)),
        )
        if len(self) == 0:
            raise BadInput(f"the corpus has {self.tokens} tokens, not enough for one block of {block}")

    def __del__(self):
        if hasattr(self, "file"):
            self.file.close()

    def __len__(self):
        return self.tokens // (self.block - 2)

    def rows(self, chosen):
        """The blocks numbered `chosen`, (B, block) int64."""
        ids = np.full((len(chosen), self.block), self.tokenizer.cls, dtype=np.int64)
        for row, number in zip(ids, chosen.tolist()):
            self.file.seek(CHECKSUM + 4 * number * (self.block - 2))
            row[1:-1] = np.fromfile(self.file, np.int32, self.block - 2)
        ids[:, -1] = self.tokenizer.sep
        return torch.from_numpy(ids)

    def epoch(self, batch_size, seed, epoch):
        """The blocks of each step of an epoch, in an order that depends on the seed and the epoch alone."""
        seed_step(seed, 1, epoch)
        return torch.randperm(len(self)).split(batch_size)

    def batch(self, chosen):
        """The blocks numbered `chosen` (B,), masked at random in every call."""
        return MaskedBatch(*(part.to(self.device) for part in mask_tokens(self.rows(chosen), self.tokenizer)))

    def frequencies(self, size):
        """How often each of `size` tokens occurs, (size,)."""
        counts = torch.zeros(size, dtype=torch.int64)
        self.file.seek(CHECKSUM)
        while len(ids := np.fromfile(self.file, np.int32, 2**20)):
            counts += torch.bincount(torch.from_numpy(ids).long(), minlength=size)
        return counts


def write_tokens(path, key, chunks):
    """Write a checksum of the key and the tokens, then the tokens: int32 arrays, one after another."""
    digest = hashlib.sha256()
    with atomic_write(path) as tmp_path, open(tmp_path, "wb") as file:
        file.seek(CHECKSUM)
        for ids in chunks:
            digest.update(ids)
            file.write(ids)
        file.seek(0)
        file.write(hashlib.sha256(f"{key} {digest.hexdigest()}".encode()).digest())


def open_tokens(path, key):
    """(open file, number of tokens, their sha256) of a file from `write_tokens`. Raises BadInput if it is damaged."""
    tokens_sha256 = sha256(path, CHECKSUM)
    file = open(path, "rb")
    if file.read(CHECKSUM) != hashlib.sha256(f"{key} {tokens_sha256}".encode()).digest():
        file.close()
        raise BadInput(f"{path} is damaged")
    return file, (os.path.getsize(path) - CHECKSUM) // 4, tokens_sha256


def token_stream(tokenizer, documents, size):
    """Yield the token ids of each document, int32, followed by [SEP]. Tokenizes a megabyte of text at a time."""
    texts, length, special = [], 0, {tokenizer.cls, tokenizer.sep, tokenizer.pad, tokenizer.mask}
    with progress(size, description="tokens", unit="B") as bar:
        for text in itertools.chain(documents, [None]):  # None: the end
            if text is not None:
                texts.append(text)
                length += len(text.encode("utf8"))
            if text is None or length > 2**20:
                for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
                    if not special.issuperset(encoding.ids):  # otherwise a block could have nothing to predict
                        yield np.array([*encoding.ids, tokenizer.sep], dtype=np.int32)
                bar.update(length)
                texts, length = [], 0


def mask_tokens(ids, tokenizer, share=0.15):
    """BERT's masking (Devlin et al. 2019, section 3.1) of ids (B, T). Uses torch's global random generator.

    A fraction `share` of the non-special tokens is predicted: 80 % of these become [MASK], 10 % a random token.
    """
    special = torch.tensor([tokenizer.cls, tokenizer.sep, tokenizer.pad, tokenizer.mask])
    draws = torch.rand(ids.shape).masked_fill_(torch.isin(ids, special), 2).flatten()
    candidates = int((draws < 2).sum())
    count = min(candidates, max(1, round(share * candidates)))
    positions = draws.argsort()[:count].sort().values
    labels = ids.flatten()[positions]
    fate = torch.rand(labels.shape)
    random_tokens = torch.randint(tokenizer.size, labels.shape)
    masked = ids.flatten().clone()
    masked[positions] = torch.where(fate < 0.8, tokenizer.mask, torch.where(fate < 0.9, random_tokens, labels))
    return MaskedBatch(masked.view(ids.shape), positions, labels)
