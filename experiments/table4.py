"""Table 4: a search on each task, and on masked language modelling, beside a fine-tuning on each task.

    python -m experiments.table4 --tasks sst2 qnli

The options are those of table1.py.
"""

from experiments.runs import METHODS, PAPER_TASKS
from experiments.tables import by_row, cell, described, grouped, make_table, markdown_table
from runtime import cli


def main():
    searches = [f"ORTicket from {task}" for task in PAPER_TASKS]
    make_table("table4", ("ORTicket", *searches, "Vanilla"), __doc__, to_markdown, attacks=("textfooler",))


def to_markdown(table, runs):
    """A matrix: a row for each task of the search, two columns for each task of the fine-tuning."""
    text = "Written by `python -m experiments.table4` from table4.json. ORTicket: the search on masked language "
    text += "modelling. In parentheses the paper's numbers for BERT-base.\n"
    matrices = {}
    for (task, settings, resources), group in grouped(runs):
        alike = {name: value for name, value in settings.items() if name != "n"}, resources
        matrices.setdefault(repr(alike), {})[task] = settings, resources, group
    for tasks in matrices.values():
        settings, resources, group = next(iter(tasks.values()))
        text += f"\n{described(settings, group)}\n\n" + "".join(f"- {name}: {of}\n" for name, of in resources.items())
        columns = [(task, f"{attack} Aua%") for task in tasks for attack in settings["attacks"].split()]
        columns = [pair for task in tasks for pair in [(task, "Clean%"), *(c for c in columns if c[0] == task)]]
        rows = {task: by_row(group) for task, (_, _, group) in tasks.items()}
        labels = sorted({label for of in rows.values() for label in of}, key=lambda label: list(METHODS).index(label))
        lines = [
            [
                label,
                *(cell(rows[task][label], column, table) if label in rows[task] else "-" for task, column in columns),
            ]
            for label in labels
        ]
        text += markdown_table("searched on", [f"{task} {column}" for task, column in columns], lines)
    return text


if __name__ == "__main__":
    cli.run(main)
