"""The verdict: does a robust ticket exist here? Tables for docs/results.md and README.md.

    python -m experiments.verdict

It reads the runs of `python -m experiments.table1 --results experiments/results/verdict`: seeds of Vanilla, FreeLB,
ORTicket, the vanilla ticket and the random ticket, from one or several starts, under attacks of several strengths and
on samples of several sizes. Runs with `--finetune ticket-seed=N` are additional random tickets. The tables replace what
stands between two marks in these files. README.md also gets a row in the table of its status.
"""

import re
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

import attack
from checkpoints.provenance import ROOT, read_result
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
TESTED = ("ORTicket", "Vanilla")
HALVINGS = 200  # random halves of the sentences, to choose a ticket on one and measure it on the other
METHODS = ("Vanilla", "FreeLB", "ORTicket", "Vanilla ticket", "Random ticket")
COLUMN = "textfooler Aua%"
COLUMNS = ("Clean%", COLUMN, "textfooler Suc%", "textfooler #Query")
# label -> column of our runs, of the paper's Table 2
RATIOS = {
    "parameters": ("M parameters", "M parameters"),
    "speed of fine-tuning": ("tokens_per_second", "speed"),
    "memory of fine-tuning": ("GB", None),
}
NAMES = {"minilm": "MiniLM", "minilm-mlm": "MiniLM + 1 epoch of MLM", "minilm-mlm2": "MiniLM + 2 epochs of MLM"}


@dataclass
class Options:
    results: str = option("experiments/results", "folder of verdict/table1.json, and of the losses of experiments.mlm")


def main():
    options = cli.parse(Options, __doc__)
    path = Path(options.results) / "verdict" / "table1.json"
    starts = grouped(load_runs(path))
    if not starts:
        raise BadInput(f"{path} has no runs of Vanilla and ORTicket on sst2: python -m experiments.table1 makes them")
    first = {start: next(iter(attacks.items())) for start, attacks in starts.items()}  # {start: (strength, methods)}
    page = summary(first, {start: mlm_loss(options.results, start) for start in starts}) + all_starts(starts)[1]
    for start, (strength, methods) in first.items():
        page += f"\n{name(start)}, {setting(strength, methods)}:\n{table(methods)}"
    page += f"\nAua% under attacks of several strengths:\n{attacks_table(starts)}{random_table(starts)}"
    replace(ROOT / "docs" / "results.md", f"{BEGIN}\n.*?{END}\n", f"{BEGIN}{page}{END}\n")
    replace(ROOT / "README.md", f"{BEGIN}\n.*?{END}\n", f"{BEGIN}{small_table(first)}{END}\n")
    row = status(first, all_starts(starts)[0])
    replace(ROOT / "README.md", rf"\| {re.escape(ROW)} \|.*?\n", f"| {ROW} | {row} |\n")
    print(f"{page}\nThe text around the tables in docs/results.md is written by hand: adapt it.")


def replace(path, pattern, text):
    """Put `text` in place of the only match of `pattern` in a file."""
    changed, count = re.subn(pattern, lambda match: text, path.read_text("utf8"), flags=re.DOTALL)
    if count != 1:
        raise BadInput(f"{path} has {count} places for the verdict, not 1: restore it")
    files.write_text(path, changed)


def mlm_loss(results, start):
    """The MLM loss of a start on held-out text, None if `experiments.mlm` did not measure it."""
    own = Path(results, f"{start}.json")
    if own.is_file():  # the start is what experiments.mlm trained
        return read_result(own)["loss_after"]
    for path in sorted(Path(results).glob(f"{start}-mlm*.json")):  # what it trained it from
        return read_result(path)["loss_before"]


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
        cosine = float(overrides.get("attack", {}).get("min_cosine", attack.Options.min_cosine))
        strength, training = (cosine, run["settings"]["n"]), dict(overrides.get("finetune", {}))
        is_more = training.pop("ticket_seed", None)
        training = dict(training.items() - shared_options[start])
        plain = method + (overrides_text({"finetune": training}) if training else "")
        label = "more random tickets" if is_more and not training else plain
        own = {name: overrides.get(name, {}) for name in ("search", "draw", "robustt")}
        shared = {"attack": overrides.get("attack", {}), "resources": run["resources"]}
        always = {"settings": run["settings"] | {"n": None}}
        for kind, of in (((start,), always), ((start, strength), shared), ((start, strength, plain), own)):
            if differing := [name for name in of if kinds.setdefault(kind, of)[name] != of[name]]:
                raise BadInput(
                    f"runs of {method} from {start} at cosine {cosine:g} on {strength[1]} sentences differ in "
                    f"{', '.join(differing)}: keep one kind of runs in --results"
                )
        groups.setdefault(start, {}).setdefault(strength, {}).setdefault(label, []).append(run)
    starts = {}
    for start, attacks in sorted(groups.items()):
        complete = [strength for strength, methods in attacks.items() if seeds_of(methods)]
        complete.sort(key=lambda of: (-len(seeds_of(attacks[of])), -len(attacks[of].keys() & METHODS), -of[1], of[0]))
        starts |= {start: {strength: attacks[strength] for strength in complete}} if complete else {}
    return starts


def seeds_of(methods):
    """The seeds that ORTicket and Vanilla have in common."""
    return frozenset.intersection(*(frozenset(run["seed"] for run in methods.get(method, [])) for method in TESTED))


def name(start):
    return NAMES.get(start, start)


def setting(strength, methods):
    settings = methods["ORTicket"][0]["settings"]
    rows = f"{settings['train_rows']:,}" if settings["train_rows"] else "all"
    attacked = f"TextFooler on {strength[1]} sentences, substitutes of cosine {strength[0]:g} or more"
    return f"{len(seeds_of(methods))} seeds, {rows} training rows, {settings['epochs']} epochs, {attacked}"


def summary(first, losses):
    """A column for the paper and for each start. first: {start: (strength, methods)}, its attack with the most seeds.
    losses: {start: MLM loss}."""
    labels = {label for _, methods in first.values() for label in methods} - {*TESTED, "more random tickets"}
    labels = sorted(labels, key=lambda label: (label not in METHODS, label))
    pairs = [(COLUMN, held, *TESTED), *((COLUMN, held, "ORTicket", label) for label in labels)]
    pairs += [(COLUMN, held, label, "Vanilla") for label in labels]
    pairs += [("Clean%", is_clean, *TESTED), *(("Clean%", is_clean, "ORTicket", label) for label in labels)]
    rows = {
        "sentences": ["872", *(str(n) for (_, n), _ in first.values())],
        "minimum cosine of a substitute": ["0.5", *(f"{cosine:g}" for (cosine, _), _ in first.values())],
        "seeds of ORTicket and Vanilla": ["-", *(str(len(seeds_of(methods))) for _, methods in first.values())],
        "MLM loss on held-out text": ["-", *("-" if losses[of] is None else f"{losses[of]:.2f}" for of in first)],
    }
    for column, score, ours, other in pairs:
        results = [compared(methods, ours, other, score) for _, methods in first.values()]
        rows[f"{column.split()[-1]}: {ours} minus {other}"] = [paper(ours, other, column), *map(marked, results)]
    for label, columns in RATIOS.items():
        rows[f"{label}, relative to Vanilla"] = [
            paper_ratio(columns),
            *(ratio(of, columns[0]) for _, of in first.values()),
        ]
    errors = [num_errors(methods) for _, methods in first.values()]
    if any(errors):
        rows["attacks that ended in an error, not counted"] = ["-", *map(str, errors)]
    return markdown_table(["", "the paper", *map(name, first)], [[row, *of] for row, of in rows.items()])


def all_starts(starts):
    """(the difference of ORTicket and Vanilla, the scores of models of one seed averaged over the starts; as lines).
    A line for each attack that several starts have with the same settings and seeds. The difference is that of the most
    starts, then the most sentences. ({}, "") without several such starts."""
    alike, lines, lead = {}, "", {}
    for start, attacks in starts.items():
        for strength, methods in attacks.items():
            seeds, both = paired(*(methods[of] for of in TESTED), "sst2", "textfooler")
            run = methods["ORTicket"][0]
            made = run["settings"] | {"model": None}, run["overrides"], run["resources"], seeds
            alike.setdefault((strength, repr(made)), {})[start] = both
    several = [(strength, of) for (strength, _), of in alike.items() if len(of) > 1]
    for (cosine, n), of in sorted(several, key=lambda item: (-len(item[1]), -item[0][1], item[0][0])):
        result = compare_known(np.mean(list(of.values()), 0))
        if "p" in result:
            lead = lead or result
            which = "all starts" if len(of) == len(starts) else " and ".join(map(name, of))
            lines += f"- the mean over {which}, cosine {cosine:g}, {n} sentences: {marked(result)}\n"
    return lead, f"\nAua%: ORTicket minus Vanilla over several starts:\n\n{lines}" if lines else ""


def is_significant(result):
    return "p" in result and abs(result["difference"]) > result["interval"] and result["p"] <= 0.05


def marked(result):
    """The difference, its interval and p, in bold if it is significant."""
    return f"**{with_p(result)}**" if is_significant(result) else with_p(result)


def paper(ours, other, column):
    """The paper's difference between two methods, "-" if it has none."""
    rows, number = PAPER["table1"]["rows"]["sst2"], PAPER["table1"]["columns"].index(column)
    return f"{rows[ours][number] - rows[other][number]:+.1f}" if {ours, other} <= rows.keys() else "-"


def paper_ratio(columns):
    rows, columns_of_paper = PAPER["table2"]["rows"]["sst2"], PAPER["table2"]["columns"]
    if columns[1] not in columns_of_paper:
        return "-"
    ours, theirs = (rows[method][columns_of_paper.index(columns[1])] for method in TESTED)
    return f"{ours / theirs:.2f}"


def num_errors(methods):
    """The attacks that ended in an error, in all runs."""
    return sum(run["figures"]["textfooler errors"] for runs in methods.values() for run in runs)


def ratio(methods, column):
    """ORTicket's figure relative to Vanilla's with the same seed: the geometric mean and its 95 % interval."""
    machines = {run["machine"] for method in TESTED for run in methods[method]}
    if len(machines) > 1 and column != "M parameters":  # speeds cannot be compared
        return "-"
    ours, theirs = ({run["seed"]: run["figures"][column] for run in methods[method]} for method in TESTED)
    logs = np.log([ours[seed] / theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
    if len(logs) < 2 or np.ptp(logs) < 1e-9:
        return f"{np.exp(logs.mean()):.2f}"
    low, high = np.exp(stats.ttest_1samp(logs, 0).confidence_interval())
    return f"{np.exp(logs.mean()):.2f} ({low:.2f} to {high:.2f})"


def compared(methods, ours, reference, score=held):
    """`difference` of two methods; {} for a method with itself."""
    runs = [methods.get(method, []) for method in (ours, reference)]
    return difference(*runs, "sst2", "textfooler", score) if ours != reference else {}


def table(methods):
    rows = []
    others = sorted(methods.keys() - {*METHODS, "more random tickets"})
    for method in [*(method for method in METHODS if method in methods), *others]:
        cells = [cell("verdict", methods[method], "sst2", column) for column in COLUMNS]
        against = [marked(compared(methods, method, of)) for of in ("Vanilla", "Random ticket", "Vanilla ticket")]
        rows.append([method, str(len(methods[method])), *cells, *against])
    minus = "Aua% minus Vanilla's", "minus the random ticket's", "minus the vanilla ticket's"
    return markdown_table(["", "seeds", *COLUMNS, *minus], rows)


def attacks_table(starts):
    """A row for each start and attack. If the attacks on the same sentences have different seeds, those with more also
    have a row of the seeds that all have."""
    rows = []
    for start, attacks in starts.items():
        for (cosine, n), methods in sorted(attacks.items()):
            own = seeds_of(methods)
            shared = frozenset.intersection(*(seeds_of(of) for (_, m), of in attacks.items() if m == n))
            for seeds in dict.fromkeys((own, shared)):
                runs = {
                    label: [run for run in of if run["seed"] in seeds or seeds == own] for label, of in methods.items()
                }
                cells = [cell("verdict", runs.get(method, []), "sst2", COLUMN) for method in METHODS]
                counts = name(start), f"{cosine:g}", str(n), str(len(seeds))
                rows.append([*counts, *cells, marked(compared(runs, *TESTED))])
    return markdown_table(["", "cosine", "sentences", "seeds", *METHODS, "ORTicket minus Vanilla"], rows)


def random_tickets(methods):
    """{number of a random ticket: its runs, each with another seed; the first is the one with which it is chosen}."""
    by_ticket, seen = {}, set()
    more = sorted(methods.get("more random tickets", []), key=lambda run: run["seed"])
    for run in [*methods.get("Random ticket", []), *more]:
        number = int(run["overrides"].get("finetune", {}).get("ticket_seed", run["seed"]))
        if (number, run["seed"]) not in seen:
            seen.add((number, run["seed"]))
            by_ticket.setdefault(number, []).append(run)
    return dict(sorted(by_ticket.items()))


def random_table(starts):
    """Is one of the random tickets better than Vanilla? "" without several tickets."""
    columns = {}
    for start, attacks in starts.items():
        strength = max(attacks, key=lambda of: (len(attacks[of]["Vanilla"]) > 1, len(random_tickets(attacks[of]))))
        if found := best_random(attacks[strength]):
            columns[start] = {
                "sentences": str(strength[1]),
                "minimum cosine of a substitute": f"{strength[0]:g}",
            } | found
    if not columns:
        return ""
    rows = [[row, *(of[row] for of in columns.values())] for row in next(iter(columns.values()))]
    return f"\nThe best random ticket, Aua%:\n{markdown_table(['', *map(name, columns)], rows)}"


def best_random(methods):
    """{label: cell}: the best random ticket, with the best of as many runs of Vanilla as a control. The best ticket's
    runs with other seeds show whether the ticket or its fine-tuning was good. {} without several tickets."""
    by_ticket = random_tickets(methods)
    tickets = [held(first, "textfooler") for first, *_ in by_ticket.values()]
    full = [held(run, "textfooler") for run in methods["Vanilla"]]
    n = min(len(tickets), len(full))
    known = ~np.isnan([*tickets, *full]).any(0)
    if n < 2 or not known.any():
        return {}
    tickets, full = (np.array(of)[:, known] for of in (tickets, full))
    every, few, control = (best_of(of, full.mean(0)) for of in (tickets, tickets[:n], full[:n]))
    best, *others = list(by_ticket.values())[tickets.mean(1).argmax()]
    return {
        "random tickets": str(len(tickets)),
        "runs of Vanilla": str(len(full)),
        "best of all tickets, minus Vanilla's mean": shown(over_sentences(every)),
        "best of as many tickets as runs of Vanilla, minus Vanilla's mean": shown(over_sentences(few)),
        "best run of Vanilla, minus Vanilla's mean": shown(over_sentences(control)),
        "best of as many tickets minus best run of Vanilla": shown(over_sentences(few - control)),
        "the ticket that is best on all sentences": f"{best['figures'][COLUMN]:.1f}",
        "the same ticket, fine-tuned with other seeds": cell("verdict", others, "sst2", COLUMN),
        "number of these seeds": str(len(others)),
        "minus Vanilla with these seeds": with_p(difference(others, methods["Vanilla"], "sst2", "textfooler")),
    }


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


def small_table(first):
    """For README.md: the starts side by side. Starts with another setting than the first are left out."""
    settings = {start: setting(*of) for start, of in first.items()}
    shared = next(iter(settings.values()))
    first = {start: methods for start, (_, methods) in first.items() if settings[start] == shared}
    rows = {method: [method] for method in METHODS if any(method in methods for methods in first.values())}
    for methods in first.values():
        for method, row in rows.items():
            row += [cell("verdict", methods.get(method, []), "sst2", column) for column in COLUMNS[:2]]
            row.append(marked(compared(methods, method, "Vanilla")))
    heads = [f"{name(start)}: {column}" for start in first for column in ("Clean%", "Aua%", "Aua% minus Vanilla's")]
    legend = (
        f"SST-2, {shared}. Aua%: accuracy under attack. ±: standard deviation, of differences half of the "
        "95 % interval. [More](docs/results.md)."
    )
    text = textwrap.fill(legend, 120, break_on_hyphens=False)
    return f"{markdown_table(['', *heads], list(rows.values()))}\n{text}\n"


def status(first, together):
    """For the table of README.md's status: ORTicket minus Vanilla from each start, and from several together."""
    results = {name(start): compared(methods, *TESTED) for start, (_, methods) in first.items()}
    significant = {start: of["difference"] > 0 for start, of in results.items() if is_significant(of)}
    said = ""
    for is_gain, what in ((True, "A gain"), (False, "A loss")):
        if starts := [start for start, sign in significant.items() if sign == is_gain]:
            said += f"**{what}** from {' and '.join(starts)}. "
    if not significant:
        said = "**No significant difference** from any start. " if any("p" in of for of in results.values()) else ""
    listed = [f"{marked(result)} from {start}" for start, result in results.items()]
    listed += [f"{marked(together)} on average over several starts"] if together else []
    said += f"ORTicket minus Vanilla in points of Aua% under TextFooler on SST-2: {', '.join(listed)}"
    return f"{said}; the paper's, with BERT-base, is {paper(*TESTED, COLUMN)}"


if __name__ == "__main__":
    cli.run(main)
