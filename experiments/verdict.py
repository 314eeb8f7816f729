"""The verdict: does a robust ticket exist here? Written by the code into docs/results.md and README.md.

    python -m experiments.verdict

It reads the runs of `python -m experiments.table1 --results experiments/results/verdict`: seeds of Vanilla, FreeLB,
ORTicket, the vanilla ticket and the random ticket, from one or several starts, under attacks of several strengths. The
text stands between two marks in docs/results.md; in README.md it is one row of the table of the state.
"""

import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import attack
from checkpoints.provenance import read_result
from experiments.tables import PAPER, cell, difference, load_runs, markdown_table, shown
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
    groups = {}  # (start, least cosine of a substitute): {method: runs}
    for run in runs:
        cosine = run["overrides"].get("attack", {}).get("min_cosine", attack.Options.min_cosine)
        key = Path(run["settings"]["model"]).name, float(cosine)
        groups.setdefault(key, {}).setdefault(run["method"], []).append(run)
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
