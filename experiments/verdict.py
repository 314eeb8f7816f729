"""The verdict: does a robust ticket exist here? Written by the code into docs/results.md and README.md.

    python -m experiments.verdict

It reads the runs of `python -m experiments.table1 --results experiments/results/verdict`: seeds of Vanilla, FreeLB,
ORTicket, the vanilla ticket and the random ticket, from one or several starts, under attacks of several strengths and
on samples of several sizes. Runs with `--finetune ticket-seed=N` are additional random tickets. Those of `python -m
experiments.figure2` in the same folder say how Aua% changes with the pruning ratios. The text goes between two marks in
docs/results.md. README.md gets a row in the table of its status, and a table between the same marks.
"""

import collections
import itertools
import re
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from checkpoints.provenance import ROOT, read_result
from experiments.figure2 import PRUNED, fit_ratios, least_cosine
from experiments.runs import overrides_text
from experiments.tables import (
    PAPER,
    cell,
    compare_known,
    difference,
    held,
    is_clean,
    load_runs,
    markdown_table,
    paired,
    shown,
    with_p,
)
from runtime import cli, files
from runtime.cli import BadInput, option

BEGIN, END = "<!-- verdict -->", "<!-- end of the verdict -->"
ROW = "**The paper's robustness gain**"  # of README.md
NOT_SHOWN = "**no difference is shown**"
TESTED = ("ORTicket", "Vanilla")
HALVINGS = 200  # random halves of the sentences, to choose a ticket on one and measure it on the other
METHODS = ("Vanilla", "FreeLB", "ORTicket", "Vanilla ticket", "Random ticket")
COLUMN = "textfooler Aua%"
COLUMNS = ("Clean%", COLUMN, "textfooler Suc%", "textfooler #Query")
NAMES = {"minilm": "MiniLM as published", "minilm-mlm": "MiniLM trained further on MLM"}
COMMAND = (
    'python -m experiments.table1 --tasks sst2 --methods Vanilla ORTicket "Random ticket" --seeds 7 '
    "--attacks textfooler --results experiments/results/verdict"
)
PAPERS_ATTACK = "--attack encoder=use vectors=textattack"
COST = ROOT / "benchmarks" / "results" / "cost.json"
LEGEND = (
    "Means are ± the standard deviation over seeds. Differences are paired by seed and sentence, those in Clean% "
    "over the attacked sentences. They are ± half of their 95 % interval, the widest of those over seeds and "
    "sentences, over the seeds alone and over the sentences alone (Student's t, over 6 to 12 seeds also by "
    "permutation), and at least 3 / sentences. p is the largest of those of t-tests and of permutations over "
    "seeds and over sentences; n seeds give no p below 2 / 2^n. A difference is shown if its interval excludes 0 "
    "and p is at most 0.05; a difference that is not shown may still exist. No p is corrected for the number of "
    "comparisons. All runs share the training rows, the search corpus and the kind of attack; the intervals do "
    "not cover a change of these."
)


@dataclass
class Options:
    results: str = option("experiments/results", "folder of mlm.json, verdict/table1.json and verdict/figure2.json")


def main():
    options = cli.parse(Options, __doc__)
    folder = Path(options.results) / "verdict"
    runs = [load_runs(folder / f"{name}.json") for name in ("table1", "figure2")]
    cost = files.read_json(COST)["figures"]
    hours = {machine: row["21 runs"] for machine, row in cost.items() if machine.startswith("one ")}
    text, row, summary = verdict(*runs, mlm_losses(options.results), hours)
    replace(ROOT / "docs" / "results.md", f"{BEGIN}\n.*?{END}\n", f"{BEGIN}\n{text}{END}\n")
    replace(ROOT / "README.md", rf"\| {re.escape(ROW)} \|.*?\n", f"| {ROW} | {row} |\n")
    replace(ROOT / "README.md", f"{BEGIN}\n.*?{END}\n", f"{BEGIN}\n{summary}{END}\n")
    print(text, end="")


def replace(path, pattern, text):
    """Put `text` in place of the only match of `pattern` in a file."""
    changed, count = re.subn(pattern, lambda match: text, path.read_text("utf8"), flags=re.DOTALL)
    if count != 1:
        raise BadInput(f"{path} has {count} places for the verdict, not 1: restore it")
    files.write_text(path, changed)


def mlm_losses(results):
    """{start: its MLM loss on held-out text}, as experiments.mlm measured it."""
    losses = read_result(Path(results) / "mlm.json")
    if losses["settings"]["model"] != "minilm":
        raise BadInput(
            f"{results}/mlm.json is of {losses['settings']['model']}: run python -m experiments.mlm --model minilm"
        )
    return {"minilm": losses["loss_before"], "minilm-mlm": losses["loss_after"]}


def verdict(runs, ratio_runs, losses, hours=None):
    """(text of docs/results.md, row and table of README.md). runs: of Table 1. ratio_runs: of Figure 2. losses:
    {start: MLM loss}. hours: {machine: those of `COMMAND` with BERT-base}."""
    starts, fits = grouped(runs), fit_ratios(ratio_runs)
    if not starts:
        raise BadInput(f"the table has no runs of Vanilla and ORTicket on sst2: {COMMAND} makes them")
    first = {start: next(iter(attacks.items())) for start, attacks in starts.items()}  # {start: (attack, methods)}
    claims = {f"from {name(start)}": claim(methods) for start, (_, methods) in first.items()}
    claims |= together(first)
    lines = [asked(), *(f"**F{start[1:]}**, ORTicket minus Vanilla is {of}." for start, of in claims.items())]
    lines += [control(first), what_the_search_adds(first), advice(claims, first)]
    lines += [only_bert_base(hours or {})] if "bert-base-uncased" not in starts else []
    details = []
    for start, attacks in starts.items():
        details += [described(start, losses, *first[start]), other_attacks(start, attacks)]
        most = max(attacks, key=lambda of: (len(attacks[of]["Vanilla"]) > 1, len(random_tickets(attacks[of]))))
        details.append(best_random(start, *most, attacks[most]))
    details += [ratios_line(fits)] if any("ORTicket" in key for key in fits) else []
    bullets = ["".join(f"{wrapped(line, '- ', '  ')}\n" for line in of if line) for of in (lines, details)]
    text = f"{bullets[0]}\n### In detail\n\n{bullets[1]}\n{wrapped(LEGEND)}\n"
    for start, attacks in starts.items():
        for (least, n), of in attacks.items():
            text += f"\n{name(start)}, substitutes of cosine {least:g} or more, {n} sentences:\n{table(of)}"
    text += ratios_table(fits) if fits else ""
    settings = sorted({setting(cosine, methods["ORTicket"][0]) for (cosine, _), methods in first.values()})
    summary = wrapped(
        f"SST-2{f', {settings[0]}' * (len(settings) == 1)} ([more](docs/results.md)). Aua%: "
        "accuracy under attack. ±: standard deviation, of differences half the 95 % interval."
    )
    summary += f"\n{small_table(first)}"
    row = ";<br>".join(f"{start} {of}" for start, of in claims.items())
    return text, f"ORTicket minus Vanilla under TextFooler on SST-2:<br>{row}", summary


def wrapped(text, first="", others=""):
    return textwrap.fill(text, 120, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def grouped(runs):
    """{start: {(least cosine of a substitute, sentences): {method: its runs on SST-2}}}. Attacks are sorted by
    the number of seeds, then of methods, then of sentences, the largest first. A method with --finetune options is
    another method.

    Raises BadInput for runs that cannot be compared.
    """
    groups, kinds, shared_options = {}, {}, {}
    runs = [run for run in runs if run["task"] == "sst2" and "textfooler" in run["outcomes"]]
    for run in runs:  # --finetune options that all runs of a start have do not distinguish its methods
        options = set(run["overrides"].get("finetune", {}).items())
        start = Path(run["settings"]["model"]).name
        shared_options[start] = shared_options.get(start, options) & options
    for run in runs:
        overrides, method, start = run["overrides"], run["method"], Path(run["settings"]["model"]).name
        attack, training = (least_cosine(run), run["settings"]["n"]), dict(overrides.get("finetune", {}))
        is_more = training.pop("ticket_seed", None)
        training = dict(training.items() - shared_options[start])
        plain = method + (overrides_text({"finetune": training}) if training else "")
        label = "more random tickets" if is_more and not training else plain
        own = {name: overrides.get(name, {}) for name in ("search", "draw", "robustt")}
        shared = {"attack": overrides.get("attack", {}), "resources": run["resources"]}
        always = {"settings": run["settings"] | {"n": None}}
        for kind, of in (((start,), always), ((start, attack), shared), ((start, attack, plain), own)):
            if differing := [name for name in of if kinds.setdefault(kind, of)[name] != of[name]]:
                raise BadInput(
                    f"runs of {method} from {start} at cosine {attack[0]:g} on {attack[1]} sentences differ in "
                    f"{', '.join(differing)}: keep one kind of runs in --results"
                )
        groups.setdefault(start, {}).setdefault(attack, {}).setdefault(label, []).append(run)
    starts = {}
    for start, attacks in sorted(groups.items()):
        complete = [attack for attack, methods in attacks.items() if num_seeds(methods)]
        complete.sort(key=lambda of: (-num_seeds(attacks[of]), -len(attacks[of].keys() & METHODS), -of[1], of[0]))
        starts |= {start: {attack: attacks[attack] for attack in complete}} if complete else {}
    return starts


def num_seeds(methods):
    """The number of seeds that ORTicket and Vanilla have in common."""
    return len(set.intersection(*({run["seed"] for run in methods.get(method, [])} for method in TESTED)))


def asked():
    return (
        "**Asked.** Does a ticket of ORTicket resist word substitutions better than the full model? The paper's Table "
        f"1 says yes: on SST-2 under TextFooler its Aua% (accuracy under attack) is {paper('ORTicket'):g}, the full "
        f"model's {paper('Vanilla'):g}."
    )


def paper(method):
    """The paper's Aua% of a method."""
    return PAPER["table1"]["rows"]["sst2"][method][PAPER["table1"]["columns"].index(COLUMN)]


def described(start, losses, attack, methods):
    """The settings of the runs."""
    run, seeds = methods["ORTicket"][0], num_seeds(methods)
    count = f"{seeds} seeds, each" if seeds > 1 else "1 seed,"
    loss = f"MLM loss on held-out text {losses[start]:.2f}; " if start in losses else ""
    return (
        f"**{name(start)}:** {loss}{count} with a search and a random ticket of its own; {setting(attack[0], run)}"
        f"{overrides_text(run['overrides'])}."
    )


def other_attacks(start, attacks):
    """The difference on other samples, and whether the order of the methods depends on the least cosine, with the
    seeds and the number of sentences that most attacks share."""
    cosine, n = next(iter(attacks))
    text, lead = "", attacks[cosine, n]["Vanilla"][0]["overrides"].get("attack")
    for (least, m), methods in sorted(attacks.items(), key=lambda item: item[0][0] != cosine):
        if m < n and methods["Vanilla"][0]["overrides"].get("attack") == lead:  # samples of one order are nested
            where = f"{m} of these sentences"
        elif least == cosine:
            where = f"{m} sentences"
        else:
            where = f"{m} sentences at cosine {least:g}"
        if (least, m) != (cosine, n) and (least == cosine or num_seeds(methods) >= 6):  # fewer give no p below 0.05
            text += f" On {where}, ORTicket minus Vanilla is {with_p(compared(methods, *TESTED))}."
    n = collections.Counter(n for _, n in attacks).most_common(1)[0][0]
    alike = {cosine: of for (cosine, m), of in sorted(attacks.items()) if m == n}
    methods = [method for method in METHODS if all(method in of for of in alike.values())]
    seeds = set.intersection(*({run["seed"] for run in of[method]} for of in alike.values() for method in methods))
    if len(alike) > 1 and seeds:
        means = {cosine: [mean_aua(of[method], seeds) for method in methods] for cosine, of in alike.items()}
        listed = "; ".join(f"{', '.join(f'{mean:.1f}' for mean in of)} at {cosine:g}" for cosine, of in means.items())
        pairs = itertools.combinations(np.array(list(means.values())).T, 2)  # equal means fit either order
        is_same = not any((ours > theirs + 1e-9).any() and (theirs > ours + 1e-9).any() for ours, theirs in pairs)
        least = 2 / 2 ** len(seeds)
        text += (
            f" Aua% of {', '.join(methods)} with {len(seeds)} seeds and {n} sentences, by the minimum cosine of "
            f"substitutes: {listed}. The order is {'' if is_same else 'not '}the same at all of them"
        )
        few = f", but {len(seeds)} seeds cannot show an order: they give no p below {least:g}"
        text += few * (least > 0.05) + "."
    return f"**{name(start)}, other samples and attacks:**{text}" if text else ""


def mean_aua(runs, seeds):
    return statistics.mean(run["figures"][COLUMN] for run in runs if run["seed"] in seeds)


def setting(cosine, run):
    settings = run["settings"]
    rows = f"{settings['train_rows']:,}" if settings["train_rows"] else "all"
    attacked = f"TextFooler on {settings['n']} sentences, with substitutes of cosine {cosine:g} or more"
    return f"{rows} training rows, {settings['epochs']} epochs; {attacked}"


def claim(methods):
    """What the difference between ORTicket and Vanilla shows."""
    result, gain = compared(methods, *TESTED), paper("ORTicket") - paper("Vanilla")
    if not result:
        return "unknown: no sentence was attacked without an error in all runs"
    text = f"{with_p(result)} points of Aua%"
    if "p" not in result:
        return f"{text}, of one seed"
    text += f" ({num_seeds(methods)} seeds): {judged(result)}"
    largest = result["difference"] + result["interval"]
    if largest < gain and (largest > 0 or is_shown(result)):
        gains = f"a gain above {largest:.1f}" if largest > 0 else "any gain"
        text += f"; the interval excludes {gains} (the paper's, with BERT-base, is {gain:.1f})"
    return f"{text}; {with_p(compared(methods, *TESTED, score=is_clean))} points of Clean%"


def is_shown(result):
    return abs(result["difference"]) > result["interval"] and result["p"] <= 0.05


def judged(result):
    if is_shown(result):
        return f"**the ticket is {'more' if result['difference'] > 0 else 'less'} robust**"
    if abs(result["difference"]) > result["interval"]:
        return f"{NOT_SHOWN} (the interval excludes 0, but p is above 0.05)"
    return NOT_SHOWN + " (p is at most 0.05, but the interval includes 0)" * bool(result["p"] <= 0.05)


def is_gain(result):
    return result["difference"] > 0 and is_shown(result)


def together(first):
    """{which starts: the claim about them}, with their models of the same seed averaged. {} unless several starts have
    the same settings, attack and seeds."""
    alike = {}
    for start, (attack, methods) in first.items():
        seeds, both = paired(*(methods[of] for of in TESTED), "sst2", "textfooler")
        run = methods["ORTicket"][0]
        settings = run["settings"] | {"model": None}, run["overrides"], run["resources"]
        alike.setdefault(repr((attack, seeds, settings)), {})[name(start)] = both
    claims = {}
    for of in alike.values():
        result = compare_known(np.mean(list(of.values()), 0)) if len(of) > 1 else {}
        if "p" in result:
            which = "from all starts together" if len(of) == len(first) else f"from {' and '.join(of)} together"
            claims[which] = f"{with_p(result)} points of Aua%: {judged(result)} (not a planned comparison)"
    return claims


def by_start(first, ours, reference, unit, score=held):
    """({start: the difference of two methods}, the same as text, which names the starts if one is missing)."""
    results = {name(start): compared(methods, ours, reference, score) for start, (_, methods) in first.items()}
    known = {start: result for start, result in results.items() if "p" in result}
    if len(known) == len(results):
        return known, f"{' and '.join(map(with_p, known.values()))} {unit}"
    return known, " and ".join(f"{with_p(result)} {unit} from {start}" for start, result in known.items())


def in_turn(first):
    return ", from each start in turn" * (len(first) > 1)


def control(first):
    """Does FreeLB, a defense of the paper, help the full model here, and more than a ticket? "" without runs of it."""
    sentences, gains = [], [compared(methods, *TESTED) for _, methods in first.values()]
    labels = {label for _, methods in first.values() for label in methods if label.split(",")[0] == "FreeLB"}
    for label in sorted(labels):
        results, listed = by_start(first, label, "Vanilla", "points of Aua%")
        shown_from = " and ".join(start for start, result in results.items() if is_gain(result))
        seen = f"a gain is shown from {shown_from}" if shown_from else "no gain is shown"
        known, aua = by_start(first, "ORTicket", label, "points of Aua%")
        clean = by_start(first, "ORTicket", label, "points of Clean%", is_clean)[1]
        if results:
            less = f"; ORTicket minus it is {aua}, and {clean}" if known else ""
            sentences.append(f"{label} minus Vanilla is {listed}: {seen}{less}.")
        gains += results.values()
    if not sentences:
        return ""
    text = f"**Adversarial training of the full model{in_turn(first)}.** {' '.join(sentences)}"
    if not any("p" in gain and is_gain(gain) for gain in gains):
        text += " So no method is shown to be more robust than Vanilla."
    return f"{text} In the paper FreeLB gains {paper('FreeLB') - paper('Vanilla'):.1f} points."


def what_the_search_adds(first):
    """ORTicket beside tickets that were found without a search or without an adversary. "" without runs of them."""
    others = {"Random ticket": "a random ticket", "Vanilla ticket": "the ticket of a search without FreeLB"}
    found = {label: by_start(first, "ORTicket", other, "points of Aua%") for other, label in others.items()}
    listed = "; ".join(f"minus {label} is {text}" for label, (known, text) in found.items() if known)
    return f"**What the search adds{in_turn(first)}.** ORTicket {listed}." if listed else ""


def advice(claims, first):
    """What it means for somebody who considers using a ticket."""
    text = f"**For a user.** {price(first)}"
    if all(NOT_SHOWN in of or "less robust" in of for of in claims.values()):
        text += " Nothing here speaks for it as a defense."
    return text


def random_tickets(methods):
    """{number of a random ticket: its runs, each with another seed; the first is the one with which it is chosen}."""
    by_ticket, seen = {}, set()
    for run in [*methods.get("Random ticket", []), *sorted(methods.get("more random tickets", []), key=seed_of)]:
        number = int(run["overrides"].get("finetune", {}).get("ticket_seed", run["seed"]))
        if (number, run["seed"]) not in seen:
            seen.add((number, run["seed"]))
            by_ticket.setdefault(number, []).append(run)
    return dict(sorted(by_ticket.items()))


def seed_of(run):
    return run["seed"]


def best_random(start, cosine, n, methods):
    """Is one of the random tickets better than Vanilla? The best of as many runs of Vanilla is the control. "" for one.

    If the best ticket has runs with other seeds, they show whether the ticket or its fine-tuning was good."""
    by_ticket = random_tickets(methods)
    tickets = [held(first, "textfooler") for first, *_ in by_ticket.values()]
    full = [held(run, "textfooler") for run in methods["Vanilla"]]
    count = min(len(tickets), len(full))
    if count < 2:
        return ""
    known = ~np.isnan([*tickets, *full]).any(0)
    tickets, full = (np.array(of)[:, known] for of in (tickets, full))
    every, few, control = (best_of(of, full.mean(0)) for of in (tickets, tickets[:count], full[:count]))
    text = (
        f"**{name(start)}, is any random ticket better?** A run is chosen on one half of {n} sentences and measured on "
        f"the other, for {HALVINGS} random halves, at cosine {cosine:g}. Its points above Vanilla's mean: the best of "
        f"{len(tickets)} tickets {shown(over_sentences(every))}"
    )
    if len(tickets) > count:
        text += f", of the first {count} {shown(over_sentences(few))}"
    text += (
        f", of {count} runs of Vanilla {shown(over_sentences(control))}. The best of {count} tickets minus the best of "
        f"{count} runs of Vanilla: {shown(over_sentences(few - control))}. These intervals are over the sentences, for "
        "the chosen runs."
    )
    best, *others = max(by_ticket.values(), key=lambda of: of[0]["figures"][COLUMN])
    result = difference(others, methods["Vanilla"], "sst2", "textfooler")
    if others and result:
        seeds = f"{len(others)} other seed{'s' * (len(others) > 1)}"
        text += (
            f" The best on all sentences (Aua% {best['figures'][COLUMN]:.1f}) was fine-tuned again with {seeds}: Aua% "
            f"{cell('verdict', others, 'sst2', COLUMN)}, {with_p(result)} points from Vanilla with the same seed"
            f"{'s' * (len(others) > 1)}."
        )
        if "p" in result and not is_gain(result):
            text += " So no gain of this ticket is shown: its first result also depended on the fine-tuning."
    return text


def best_of(models, reference):
    """The model that is best on one half of the sentences, measured on the other half, for `HALVINGS` random orders of
    the sentences, whose halves are the even and the odd positions. models: array (models, sentences) of 0 and 1.
    reference: (sentences,), to compare with. Returns the differences in points, (HALVINGS, sentences)."""
    generator, result = np.random.Generator(np.random.PCG64(0)), np.empty((HALVINGS, len(reference)))
    for row in result:
        d = 100 * (models - reference)[:, generator.permutation(len(reference))]  # (models, sentences)
        for chosen, measured in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            row[measured] = d[d[:, chosen].mean(1).argmax(), measured]
    return result


def over_sentences(differences):
    """The mean of differences (HALVINGS, sentences) of `best_of`, and half of its 95 % interval: the mean of those of
    the halves (Student's t), which holds however much the halves depend on each other."""
    halves = differences[:, ::2], differences[:, 1::2]
    intervals = [stats.t.ppf(0.975, half.shape[1] - 1) * stats.sem(half, 1).mean() for half in halves]
    return {"difference": differences.mean(), "interval": statistics.mean(intervals)}


def ratios_line(fits):
    """Does Aua% rise and then fall with the ratios, as Figure 2 says?"""
    found = []
    for (start, cosine, method, ratio), fit in fits.items():
        first, last = fit["first"], fit["last"]
        is_shown = first["difference"] > first["interval"] and -last["difference"] > last["interval"]
        seen = "it rises and falls" if is_shown else "no rise and fall is shown"
        slopes = f"{shown(first)} at the smallest, {shown(last)} at the largest"
        if method == "ORTicket":
            found.append(
                f"{PRUNED[ratio]} from {name(start)}, {fit['seeds']} seeds, cosine {cosine:g}: {slopes} ({seen})"
            )
    return (
        "**The pruning ratios.** In the paper's Figure 2 Aua% rises with them and then falls. ORTicket's slopes here, "
        f"in points per 0.1 of a ratio: {'; '.join(found)}."
    )


def ratios_table(fits):
    rows = []
    for (start, cosine, method, ratio), fit in fits.items():
        means = ", ".join(f"{statistics.mean(aua):.1f} at {value}" for value, aua in fit["means"].items())
        label = f"{method}, {PRUNED[ratio]}, {name(start)}, cosine {cosine:g}"
        rows.append(
            [label, f"{fit['tickets']} of {fit['seeds']} seeds", means, shown(fit["first"]), shown(fit["last"])]
        )
    text = (
        "Aua% against the pruning ratios, and the slopes of a parabola per 0.1 of the ratio. Each seed has a constant "
        "of its own; the intervals are over tickets, not over sentences."
    )
    if len({ratio for *_, ratio in fits}) > 1:
        text += " The runs at 1/6 of the heads and at 0.2 of the neurons are the same: these are the defaults."
    return f"\n{wrapped(text)}\n{markdown_table(['', 'tickets', 'Aua%', 'first slope', 'last slope'], rows)}"


def price(first):
    listed = []
    for start, (_, methods) in first.items():
        text = f"{1 - ratio(methods, 'M parameters')[0]:.1%} fewer parameters"
        machines = {run["machine"] for method in TESTED for run in methods[method]}
        if len(machines) == 1:  # else speeds cannot be compared
            (speed, factor), (memory, _) = (ratio(methods, column) for column in ("tokens_per_second", "GB"))
            interval = f" ({speed / factor:.2f} to {speed * factor:.2f})" if factor else ""
            where = f"{machines.pop()}, batches of {methods['ORTicket'][0]['settings']['batch_size']}"
            text += (
                f", {speed:.2f}{interval} times the speed of fine-tuning and {memory:.2f} times the memory ({where})"
            )
        listed.append(f"from {name(start)}, {text}")
    return (
        f"A ticket has, relative to Vanilla: {'; '.join(listed)}. Speeds and memory are geometric means over seeds, "
        "with 95 % intervals; [more](speed.md#what-a-ticket-saves)."
    )


def ratio(methods, column):
    """(ORTicket's figure relative to Vanilla's with the same seed, geometric mean; the factor by which its 95 %
    interval extends, None for one seed)."""
    ours, theirs = ({run["seed"]: run["figures"][column] for run in methods[method]} for method in TESTED)
    logs = np.log([ours[seed] / theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
    factor = np.exp(stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)) if len(logs) > 1 else None
    return np.exp(logs.mean()), factor


def only_bert_base(hours):
    taken = " and ".join(f"{number:.1f} hours on {machine}" for machine, number in hours.items())
    taken = f" About {taken}, [computed](speed.md#cost-of-the-papers-experiments)." if hours else ""
    return (
        "**Open.** The paper's model is BERT-base, which has not been trained here. Two commands answer the question "
        f"for it: `{COMMAND} --model bert-base-uncased {PAPERS_ATTACK}` and `python -m experiments.verdict`, which "
        f"writes these lines.{taken}"
    )


def name(start):
    return NAMES.get(start, start)


def table(methods):
    rows = []
    others = sorted(methods.keys() - {*METHODS, "more random tickets"})
    for method in [*(method for method in METHODS if method in methods), *others]:
        cells = [cell("verdict", methods[method], "sst2", column) for column in COLUMNS]
        references = ("Vanilla", "Random ticket", "Vanilla ticket")
        against = [with_p(compared(methods, method, reference)) for reference in references]
        rows.append([method, str(len(methods[method])), *cells, *against])
    minus = "Aua% minus Vanilla's", "minus the random ticket's", "minus the vanilla ticket's"
    return markdown_table(["", "seeds", *COLUMNS, *minus], rows)


def small_table(first):
    """For README.md: the starts side by side. first: {start: (attack, methods)}."""
    rows = {method: [method] for method in METHODS if any(method in methods for _, methods in first.values())}
    settings = {start: setting(cosine, methods["ORTicket"][0]) for start, ((cosine, _), methods) in first.items()}
    heads = [""]
    for start, (_, methods) in first.items():
        label = name(start) if len(set(settings.values())) == 1 else f"{name(start)} ({settings[start]})"
        heads += [f"{label}: {head}" for head in ("Clean%", "Aua%", "Aua% minus Vanilla's")]
        for method, row in rows.items():
            row += [cell("verdict", methods.get(method, []), "sst2", column) for column in COLUMNS[:2]]
            row.append(with_p(compared(methods, method, "Vanilla")))
    return markdown_table(heads, list(rows.values()))


def compared(methods, ours, reference, score=held):
    """`difference` of two methods; {} for a method with itself."""
    runs = [methods.get(method, []) for method in (ours, reference)]
    return difference(*runs, "sst2", "textfooler", score) if ours != reference else {}


if __name__ == "__main__":
    cli.run(main)
