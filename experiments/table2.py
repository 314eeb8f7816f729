"""Table 2: the speed of training relative to FreeLB, with and without the time of the search, and the parameters.

    python -m experiments.table2 --tasks imdb

The options are those of table1.py, but nothing is attacked.
"""

import statistics

from experiments.tables import PAPER, by_row, described, grouped, make_table, markdown_table, mean_and_deviation
from runtime import cli


def main():
    make_table("table2", ("FreeLB", "Vanilla", "ORTicket"), __doc__, to_markdown, attacked=False)


def to_markdown(table, runs):
    """One table for each task and settings. The paper's numbers stand in parentheses."""
    text = "Written by `python -m experiments.table2` from table2.json. Speed: tokens per second of training relative "
    text += "to FreeLB's mean on the same rows. With search: the seconds of FreeLB's training / (those of the search + "
    text += "those of the training). In parentheses the paper's numbers for BERT-base.\n"
    for (task, settings, _), group in grouped(runs):
        freelb = [run["figures"] for run in group if run["method"] == "FreeLB" and not run["overrides"]]
        if not freelb:
            continue
        rate, seconds = (statistics.mean(of[key] for of in freelb) for key in ("tokens_per_second", "seconds"))
        rows = []
        for label, of in by_row(group).items():
            paper = PAPER["table2"]["rows"].get(task, {}).get(label, [None] * 3)
            figures = [run["figures"] for run in of]
            with_search = [seconds / (run["seconds"] + run.get("search seconds", 0)) for run in figures]
            columns = [
                ([run["tokens_per_second"] / rate for run in figures], paper[0]),
                (with_search, None if paper[1] is None else round(paper[0] + paper[1], 1)),
                ([run["M parameters"] for run in figures], paper[2]),
                ([run["GB"] for run in figures], None),
            ]
            cells = [mean_and_deviation(ours, 2) + (f" ({theirs:g})" if theirs else "") for ours, theirs in columns]
            rows.append([label, str(len(of)), *cells])
        text += f"\n## {task}\n\n{described(settings, group)}\n"
        text += markdown_table(task, ["runs", "speed", "with search", "M parameters", "GB"], rows)
    return text


if __name__ == "__main__":
    cli.run(main)
