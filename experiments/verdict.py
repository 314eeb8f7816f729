"""The verdict: does a robust ticket exist here? Written by the code into docs/results.md and README.md.

    python -m experiments.verdict

It reads the runs of `python -m experiments.table1 --results experiments/results/verdict`: seeds of Vanilla, FreeLB,
ORTicket, the vanilla ticket and the random ticket, from one or several starts, under attacks of several strengths. Runs
with `--finetune ticket-seed=N` are more random tickets, for the upper bound. The text stands between two marks in
docs/results.md; in README.md it is one row of the table of the state.
"""

import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

import attack
from checkpoints.provenance import read_result
from experiments.runs import overrides_text
from experiments.tables import PAPER, cell, difference, held, load_runs, markdown_table, shown
from runtime import cli, files
from runtime.cli import BadInput, option

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- verdict -->", "<!-- end of the verdict -->"
ROW = "**The paper's robustness gain**"  # of README.md
PAIRS = (
    ("ORTicket", "Vanilla"),
    ("ORTicket", "Random ticket"),
    ("ORTicket", "Vanilla ticket"),
    ("Random ticket", "Vanilla"),
    ("FreeLB", "Vanilla"),
)
METHODS = ("Vanilla", "FreeLB", "ORTicket", "Vanilla ticket", "Random ticket")
COLUMN = "textfooler Aua%"
COLUMNS = ("Clean%", COLUMN, "textfooler Suc%", "textfooler #Query")
COMMAND = (
    "python -m experiments.table1 --tasks sst2 --seeds 7 --attacks textfooler --results experiments/results/verdict"
)


@dataclass
class Options:
    results: str = option("experiments/results", "folder of mlm.json and of verdict/table1.json")


def main():
    options = cli.parse(Options, __doc__)
    text, row = verdict(load_runs(Path(options.results) / "verdict" / "table1.json"), mlm_losses(options.results))
    replace(ROOT / "docs" / "results.md", f"{BEGIN}\n.*?{END}\n", f"{BEGIN}\n{text}{END}\n")
    replace(ROOT / "README.md", rf"\| {re.escape(ROW)} \|.*?\n", f"| {ROW} | {row} |\n")
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
    return {"minilm": losses["loss_before"], "minilm-mlm": losses["loss_after"]}


def verdict(runs, losses):
    """(the text of docs/results.md, the row of README.md). runs: of a table. losses: {start: MLM loss}."""
    groups, tickets = {}, {}  # {(start, least cosine of a substitute): {method: runs}}, and more random tickets
    for run in runs:
        cosine = run["overrides"].get("attack", {}).get("min_cosine", attack.Options.min_cosine)
        key, training = (Path(run["settings"]["model"]).name, float(cosine)), run["overrides"].get("finetune", {})
        methods = (tickets if "ticket_seed" in training else groups).setdefault(key, {})
        methods.setdefault(run["method"], []).append(run)
    for (start, cosine), methods in groups.items():
        for method, of in methods.items():
            if len({run["seed"] for run in of}) < len(of):
                overrides = " and ".join(sorted({overrides_text(run["overrides"]) or ", no options" for run in of}))
                raise BadInput(
                    f"the table has several runs of {method} from {start} at cosine {cosine:g} with one seed{overrides}: "
                    "give --results a folder with runs of one kind"
                )
    complete = [key for key, methods in groups.items() if {"Vanilla", "ORTicket"} <= methods.keys()]
    if not complete:
        raise BadInput(f"the table has no runs of Vanilla and ORTicket: {COMMAND} makes them")
    complete.sort(key=lambda key: (key[0], -len(groups[key]["Vanilla"]), key[1]))
    groups = {key: groups[key] for key in complete}
    starts = {}  # the attack with most seeds comes first, and is the one that counts
    for (start, cosine), methods in groups.items():
        starts.setdefault(start, {})[cosine] = methods
    lines, rows = [asked(), described(starts, losses)], []
    for start, attacks in starts.items():
        cosine, methods = next(iter(attacks.items()))
        results = {pair: compared(methods, *pair) for pair in PAIRS}
        lines.append(f"**From {name(start)}.** Points of accuracy under attack: {listed(results)}.")
        rows.append(f"from {name(start)}, {claim(results[PAIRS[0]])}: {with_p(results[PAIRS[0]])}")
        others = {other: compared(attacks[other], *PAIRS[0]) for other in attacks}
        if bounds := upper_bound(methods, tickets.get((start, cosine), {})):
            lines.append(bounds)
        if len(others) > 1:
            each = ", ".join(f"{shown(result)} at {other:g}" for other, result in sorted(others.items(), reverse=True))
            lines.append(f"**With synonyms down to another cosine**, ORTicket - Vanilla is {each}.")
    lines += [price(starts), only_bert_base()]
    text = "".join(f"- {line}\n" for line in lines)
    for (start, cosine), methods in groups.items():
        text += f"\n{name(start)}, substitutes of cosine {cosine:g} or more:\n{table(methods)}"
    return text, f"ORTicket - Vanilla in points of accuracy under TextFooler, on SST-2: {'; '.join(rows)}"


def asked():
    paper, columns = PAPER["table1"]["rows"]["sst2"], PAPER["table1"]["columns"]
    ticket, full = (paper[method][columns.index(COLUMN)] for method in PAIRS[0])
    return (
        "**Asked.** Does a ticket of ORTicket resist word substitutions better than the full model? In the paper's "
        f"Table 1 it does: on SST-2 under TextFooler its Aua% (accuracy under attack) is {ticket:g}, the full "
        f"model's {full:g}."
    )


def described(starts, losses):
    runs = [run for attacks in starts.values() for methods in attacks.values() for run in methods["Vanilla"]]
    settings, seeds = runs[0]["settings"], max(run["seed"] for run in runs) + 1
    known = {start: f" (MLM loss on held-out text {loss:.2f})" for start, loss in losses.items()}
    texts = [name(start) + known.get(start, "") for start in starts]
    rows = f"{settings['train_rows']:,}" if settings["train_rows"] else "all"
    return (
        f"**Run.** SST-2, {rows} training rows, {settings['epochs']} epochs, TextFooler on "
        f"{settings['n']} sentences, the same for all; up to {seeds} seeds, each with a search and a random ticket of "
        f"its own. Start: {' and '.join(texts)}."
    )


def claim(result):
    """What a difference says about the ticket."""
    if "p" not in result:
        return "not known"
    if abs(result["difference"]) <= result["interval"]:
        return "no difference beyond chance"
    return "the ticket is more robust" if result["difference"] > 0 else "the ticket is less robust"


def listed(results):
    return "; ".join(f"{ours} - {reference} {with_p(results[ours, reference])}" for ours, reference in results)


def upper_bound(methods, more):
    """Could any ticket do it? The best of the random tickets: chosen on one half of the sentences, it is compared with
    the mean of Vanilla on the other, and the reverse. Beside it the best of Vanilla's own runs, chosen in the same way.
    "" for fewer than two tickets."""
    tickets = [held(run, "textfooler") for run in (*methods.get("Random ticket", []), *more.get("Random ticket", []))]
    full = [held(run, "textfooler") for run in methods["Vanilla"]]
    if len(tickets) < 2:
        return ""
    best, control = (shown(best_of(models, np.mean(full, 0))) for models in (tickets, full))
    return (
        f"**The best of {len(tickets)} random tickets**, chosen on one half of the sentences and measured on the other, "
        f"has {best} points against Vanilla's mean; the best of Vanilla's own {len(full)} runs, chosen so, {control}."
    )


def best_of(models, reference):
    """models: arrays (sentences,) of 0 and 1. reference: (sentences,). The model that is best on the even sentences is
    compared on the odd ones, and the reverse. Returns the mean difference in points, and half of its 95 % interval over
    the sentences (Student's t)."""
    differences = np.empty(len(reference))
    for half in (0, 1):
        best = max(models, key=lambda of: of[half::2].mean())
        differences[1 - half :: 2] = 100 * (best - reference)[1 - half :: 2]
    interval = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return {"difference": differences.mean(), "interval": interval}


def price(starts):
    methods = next(iter(next(iter(starts.values())).values()))
    parameters, clean = ({m: mean(methods[m], column) for m in PAIRS[0]} for column in ("M parameters", "Clean%"))
    fewer = 1 - parameters["ORTicket"] / parameters["Vanilla"]
    return (
        f"**For a user.** The ticket has {fewer:.1%} fewer parameters and {clean['ORTicket'] - clean['Vanilla']:+.1f} "
        "points of Clean%. Its speed is in [speed.md](speed.md#what-a-ticket-saves)."
    )


def only_bert_base():
    return (
        "**Open.** The paper's model is BERT-base, which was never trained here. Two commands would tell: "
        f"`{COMMAND} --model bert-base-uncased` adds its runs to the table, and `python -m experiments.verdict` writes "
        "these lines from it. The hours: [speed.md](speed.md#cost-of-the-papers-experiments)."
    )


def mean(runs, column):
    return statistics.mean(run["figures"][column] for run in runs)


def name(start):
    return {"minilm": "MiniLM as published", "minilm-mlm": "MiniLM trained further on MLM"}.get(start, start)


def table(methods):
    rows = []
    for method in [method for method in METHODS if method in methods]:
        cells = [cell("verdict", methods[method], "sst2", column) for column in COLUMNS]
        against = [with_p(compared(methods, method, other)) for other in ("Vanilla", "Random ticket")]
        rows.append([method, str(len(methods[method])), *cells, *against])
    return markdown_table(["", "seeds", *COLUMNS, "Aua% - Vanilla's", "Aua% - random ticket's"], rows)


def compared(methods, ours, reference):
    """`difference` of two methods; {} for a method with itself."""
    runs = [methods.get(method, []) for method in (ours, reference)]
    return difference(*runs, "sst2", "textfooler") if ours != reference else {}


def with_p(result):
    return shown(result) + (f" (p = {result['p']:.3f})" if "p" in result else "")


if __name__ == "__main__":
    cli.run(main)
