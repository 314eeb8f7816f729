"""Is one method more robust than another? Paired differences over seeds and sentences, with an interval and a test.

Each method has an array (seeds, sentences) of 0 and 1: whether the model with that seed withstood the attack on that
sentence. Both methods share the seeds and the sentences. A claim about the method must hold for other
seeds and for other sentences, so both are treated as random: their variances are estimated as in a two-way layout.
"""

import math

import numpy as np
from scipy import stats

VISIBLE = 3.0  # points: the difference for which `seeds_needed` is given


def compare(ours, reference):
    """The difference of two methods in points, ours - reference, arrays (seeds, sentences) of 0 and 1.

    Returns a dictionary. difference: the mean. With several seeds and sentences also interval: half of the 95 %
    interval, the widest of four: three by Student's t (over both, with Satterthwaite's degrees of freedom; over the
    seeds alone; over the sentences alone) and `permutation_interval` over the seeds. It is at least 3 / sentences (the
    rule of three: what none of n sentences shows has a probability below 3 / n). p: the largest of the p of those
    t-tests and of two permutation tests, over the seeds and over the sentences. seeds_needed: a rough estimate of how
    many seeds show a difference of `VISIBLE` in 80 % of cases, with these sentences; None if no number suffices.
    """
    d = 100 * (np.asarray(ours, float) - np.asarray(reference, float))
    seeds, sentences = d.shape
    if min(d.shape) < 2:
        return {"difference": d.mean()}
    by_seed, by_sentence = d.mean(1, keepdims=True), d.mean(0, keepdims=True)
    rest = d - by_seed - by_sentence + d.mean()
    freedom = seeds - 1, sentences - 1, (seeds - 1) * (sentences - 1)
    squares = sentences * by_seed.var() * seeds, seeds * by_sentence.var() * sentences, (rest**2).sum()
    ms = [square / df for square, df in zip(squares, freedom)]  # mean squares
    ms_seed, ms_sentence, ms_rest = ms
    ms_mean = ms_seed + ms_sentence - ms_rest  # Var(mean) = ms_mean / (seeds x sentences)
    df = max(ms_mean**2 / max(sum(m**2 / f for m, f in zip(ms, freedom)), 1e-12), 1)
    sources = (ms_mean, df), (ms_seed, freedom[0]), (ms_sentence, freedom[1])
    tests = [(math.sqrt(max(m, 0) / d.size), df) for m, df in sources]  # (standard error, degrees of freedom)
    interval = max(300 / sentences, *(stats.t.ppf(0.975, df) * error for error, df in tests))
    interval = max(interval, permutation_interval(by_seed.ravel()))
    p = max(2 * stats.t.sf(abs(d.mean()) / max(error, 1e-12), df) for error, df in tests)
    p = max(p, permutation_test(by_seed.ravel()), permutation_test(by_sentence.ravel()))
    var_seed, var_sentence = max(0, (ms_seed - ms_rest) / sentences), max(0, (ms_sentence - ms_rest) / seeds)
    n = np.arange(2, 1000)
    error = np.sqrt((var_seed + ms_rest / sentences) / n + var_sentence / sentences)
    suffices = VISIBLE >= (stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) * error  # a power of 80 %
    needed = int(n[suffices][0]) if suffices.any() and d.any() else None
    return {"difference": d.mean(), "interval": interval, "p": p, "seeds_needed": needed}


def permutation_test(differences, draws=10_000):
    """The two-sided p of paired differences (n,): how often the mean is at least as far from 0 with random signs.

    Tries all 2^n combinations of signs for n <= 12, else `draws` random ones. n seeds give no p below 2 / 2^n.
    """
    n = len(differences)
    if n <= 12:
        flips = np.indices((2,) * n).reshape(n, -1).T
    else:
        flips = np.random.Generator(np.random.PCG64(0)).integers(2, size=(draws, n), dtype=np.int8)
        flips[0] = 0  # the observed signs are one of the draws
    sums = abs((1.0 - 2 * flips) @ differences)
    return (sums >= abs(differences.sum()) - 1e-9).mean()


def permutation_interval(differences):
    """Half of the 95 % interval of the mean that belongs to `permutation_test` (Hartigan 1969): 0 is in it if p > 0.05.
    0 for fewer than 6 differences, whose p is never below 0.05, and for more than 12.
    """
    n = len(differences)
    if not 6 <= n <= 12:
        return 0
    subsets = np.indices((2,) * n).reshape(n, -1)[:, 1:]  # (n, 2^n - 1)
    means, tail = np.sort(differences @ subsets / subsets.sum(0)), int(0.025 * 2**n)
    return max(differences.mean() - means[tail - 1], means[-tail] - differences.mean())
