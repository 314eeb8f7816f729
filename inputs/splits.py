"""Split a task into training, held-out and test rows, and find the classes of a custom task."""

from collections import Counter

import numpy as np

from inputs.tables import read_table, table_files
from runtime.cli import BadInput, first_few


def custom_splits(path, text_columns, label_column, drop_labels):
    """(names of the classes, {"train", "validation", "test": rows}, what the test rows are) of a custom task."""
    labels, splits = read_splits(path, text_columns, label_column, drop_labels)
    note = "the test rows are its test file"
    if "test" not in splits:
        splits, note = with_every_class(split_tenths, splits["train"]), "the test rows are a tenth of the file"
    elif "validation" not in splits:
        splits |= with_every_class(hold_out, splits["train"])
    if not all(splits.values()):
        empty = ", ".join(name for name, rows in splits.items() if not rows)
        raise BadInput(f"{path} has too few rows: none for {empty}. A split without a file takes a tenth of the rows")
    report_shared(path, splits)
    for name, rows in splits.items():
        if missing := set(range(len(labels))) - {label for _, label in rows}:
            print(f"{path}: the {name} rows have none of {first_few(repr(labels[i]) for i in sorted(missing))}")
    return labels, splits, note


def report_shared(name, splits):
    """Print how many test rows have the text of a training row, if any: the model may have memorized them."""
    seen = {texts for texts, _ in splits["train"]}
    if count := sum(texts in seen for texts, _ in splits["test"]):
        print(f"{name}: {count:,} of {len(splits['test']):,} test rows have the text of a training row")


def read_splits(path, text_columns, label_column, drop_labels):
    """(names of the classes, {split: [(texts, number of the class)]}) of a table file, or a folder of them.

    The classes are the sorted labels of the training rows, integers by value. They are printed.
    """
    files = table_files(path) if path.is_dir() else {"train": path}
    tables = {split: read_table(file, text_columns, label_column) for split, file in files.items()}
    for dropped in drop_labels:
        if not any(label == dropped for table in tables.values() for _, _, label in table):
            raise BadInput(f"--drop-labels {dropped}: no row of {path} has this label")
    tables = {split: [row for row in table if row[2] not in drop_labels] for split, table in tables.items()}
    counts = Counter(label for _, _, label in tables["train"])
    labels, rows = sorted(counts), len(tables["train"])
    if all(label.isdecimal() for label in labels):  # by value: 2 before 10, and 01 before 1
        labels.sort(key=lambda label: (len(label.lstrip("0")), label.lstrip("0")))
    if len(labels) < 2:
        raise BadInput(f"{path} has fewer than two labels in column {label_column!r}: {first_few(labels)}")
    if len(labels) > max(20, rows / 2):
        reason = f"{len(labels):,} labels in {rows:,} rows of column {label_column!r} are too many for classes"
        raise BadInput(f"{path}: {reason}: write a column with few classes and name it with --label-column")
    print(f"{path}: {len(labels):,} classes: {first_few(f'{label!r} {counts[label]:,}' for label in labels)}")
    numbers = {label: number for number, label in enumerate(labels)}
    for split, table in tables.items():
        for line, _, label in table:
            if label not in numbers:
                unknown = f"{files[split]} line {line} has label {label!r:.200}, which no training row has"
                raise BadInput(f"{unknown}: leave such rows out with --drop-labels, or give a file with labels")
    return tuple(labels), {split: [(texts, numbers[label]) for _, texts, label in of] for split, of in tables.items()}


def hold_out(rows):
    """Split rows into training rows and every tenth row, which is held out for validation."""
    return {"train": [row for i, row in enumerate(rows) if i % 10], "validation": rows[::10]}


def split_tenths(rows):
    """Make every tenth row a test row, and every tenth of the others a validation row. Rows are sorted by label."""
    rows = list(rows)
    return hold_out([row for i, row in enumerate(rows) if i % 10]) | {"test": rows[::10]}


def with_every_class(split, rows):
    """Sort the rows by label, then `split` them: with alternating labels, every tenth row could have the same one.
    Within a label the order is pseudo-random and depends only on the number of rows. A class of one or two rows keeps
    the first for training."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(rows))
    counts, first, others = Counter(label for _, label in rows), [], []
    for row in sorted((rows[i] for i in order), key=lambda row: row[1]):
        (first if counts[row[1]] < 3 else others).append(row)
        counts[row[1]] = 3
    splits = split(others)
    return splits | {"train": first + splits["train"]}


def first_rows(rows, count, task):
    """A fixed choice of `count` training rows; all if count is None."""
    if count is None:
        return rows
    if count > len(rows):
        raise BadInput(f"--train-rows {count}: {task} has only {len(rows):,} rows")
    chosen = np.random.Generator(np.random.PCG64(0)).permutation(len(rows))[:count]
    first = [rows[i] for i in sorted(chosen)]
    if missing := len({label for _, label in rows}) - len({label for _, label in first}):
        print(f"--train-rows {count} leaves no row of {missing} classes of {task}")
    return first
