"""The results of an attack: one line of JSON per example, the paper's metrics, and how both are printed.

Aua% is failed / (succeeded + failed + skipped), where examples that are misclassified without an attack are skipped.
Suc% is succeeded / (succeeded + failed), and #Query the mean number of queries of these. Attacks that end in an error
are not counted, and are retried when the command is rerun. The other figures are means over successful attacks.
"""

import contextlib
import difflib
import hashlib
import json
import os
import re
import sys
from collections import Counter
from statistics import mean

import filelock

from checkpoints.provenance import identity, is_up_to_date, json_sha256, read_result, write_result
from runtime import distributed, files
from runtime.cli import BadInput


class Results:
    """ATTACK.jsonl, a line per example that several processes may append, and ATTACK.json, the summary.

    Raises BadInput if the files were written with other settings, unless `overwrite`.
    """

    def __init__(self, path, provenance, name, used, sample, overwrite):
        self.path, self.summary, self.sample, self.rows = path, path.with_suffix(".json"), sample, {}
        self.provenance = provenance | {"resources": used, "resources_sha256": json_sha256(used)}
        self.provenance["settings"] = provenance["settings"] | {"attack": name}
        self.run_sha256 = json_sha256(identity(self.provenance))
        self.lock = filelock.FileLock(path.with_suffix(".lock"))
        self.overwrite = distributed.broadcast_from_main(lambda: self.prepare(overwrite))
        self.read()

    def prepare(self, overwrite):
        """Start a run, or continue an interrupted one. Returns whether it was started with --overwrite."""
        found = is_up_to_date(self.summary, self.provenance, overwrite)
        if overwrite and not found:
            self.path.unlink(missing_ok=True)
        read_rows(self.path, self.run_sha256)  # rows of another run are refused, even without a summary
        if self.path.is_file():  # an interrupted run may have left half a line
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        if found:
            return read_result(self.summary).get("overwrite", False)
        write_result(self.summary, self.provenance | {"overwrite": overwrite})
        return overwrite

    def read(self):
        """Read `rows`, {example: row}, as written by all processes."""
        with self.lock:
            self.rows = read_rows(self.path, self.run_sha256)

    def add(self, row):
        self.rows[row["example"]] = row
        with self.lock, open(self.path, "ab") as file:
            file.write(self.to_line(row))

    def to_line(self, row):
        """A row as a line of JSON, with a checksum that also depends on the run."""
        text = json.dumps(row, ensure_ascii=False).encode("utf8", "replace")
        return text[:-1] + end_of_line(text, self.run_sha256) + b"\n"

    def show(self, bar, is_shared):
        """Update the progress bar. is_shared: whether other processes also write."""
        if is_shared:
            self.read()
        bar.n = len(self.rows)
        bar.set_postfix_str(lambda: f"Aua {self.figures()['aua'] or 0:.1%}")

    def figures(self):
        """The metrics as fractions, each None if there is nothing to divide by, and the number of each outcome."""
        outcomes = Counter(row["outcome"] for row in self.rows.values())
        attacked = [row for row in self.rows.values() if row["outcome"] in ("failed", "succeeded")]
        changed = [row for row in attacked if row["outcome"] == "succeeded"]
        examples = len(attacked) + outcomes["skipped"]
        return {
            "aua": outcomes["failed"] / examples if examples else None,
            "suc": len(changed) / len(attacked) if attacked else None,
            "queries": mean(row["queries"] for row in attacked) if attacked else None,
            "words_changed": mean(row["words_changed"] / row["words"] for row in changed) if changed else None,
            "similarity": mean(row["similarity"] for row in changed) if changed else None,
            "without_substitute": sum(row["candidates"] == 0 for row in attacked),
            "outcomes": dict(outcomes),
        }

    def summarize(self, clean, count):
        """Write the summary: provenance, metrics and errors. Once all examples are done, sort their lines as in the
        sample and drop errors. Print `count` successful attacks. Returns (metrics, None or why they mean nothing)."""
        errors = {number: row["reason"] for number, row in self.rows.items() if row["outcome"] == "error"}
        if len(self.rows) == len(self.sample):
            with files.atomic_write(self.path) as tmp_path, open(tmp_path, "wb") as file:
                file.writelines(self.to_line(self.rows[number]) for number in self.sample if number not in errors)
            with contextlib.suppress(OSError):  # on Windows, if another process has it
                os.unlink(self.lock.lock_file)
        figures = {"clean": clean, **self.figures(), "examples": len(self.rows), "errors": errors}
        unfinished = {"overwrite": self.overwrite} if len(self.rows) < len(self.sample) else {}
        write_result(self.summary, self.provenance | figures | unfinished)
        for row in [row for row in self.rows.values() if row["outcome"] == "succeeded"][:count]:
            print_change(row)
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in sorted(figures["outcomes"].items()))
        print(f"{len(self.rows)} of {len(self.sample)} examples attacked: {outcomes or 'none'}; {self.path}")
        if figures["without_substitute"]:
            print(f"{figures['without_substitute']} failed because no word of the text had a substitute")
        if errors:
            number, reason = next(iter(errors.items()))
            print(f"errors are excluded from the metrics; the first, of example {number}: {reason}")
            if figures["suc"] is None:
                return figures, f"every attack ended in an error, such as {reason}: see {self.summary}"
        attacked = sum(figures["outcomes"].get(outcome, 0) for outcome in ("failed", "succeeded"))
        if figures["without_substitute"] == attacked > 0 and len(self.rows) == len(self.sample):
            remedy = "use another --attack, or --vectors in the texts' language"
            return figures, f"no word of any text had a substitute, so that {self.path.stem} attacked nothing: {remedy}"
        return figures, None


def read_rows(path, run_sha256):
    """{example: row} of ATTACK.jsonl. Raises BadInput if a line is damaged or another run's."""
    rows = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else [], 1):
        text = line.rpartition(b', "checksum"')[0] + b"}"
        if line != text[:-1] + end_of_line(text, run_sha256):
            remedy = "remove the line to attack its example again, or use --overwrite"
            raise BadInput(f"{path} line {number} is damaged or another run's: {remedy}")
        row = json.loads(text)
        rows[row["example"]] = row
    return rows


def end_of_line(text, run_sha256):
    checksum = hashlib.sha256(run_sha256.encode() + text).hexdigest()[:32]
    return f', "checksum": "{checksum}"}}'.encode()


def print_table(figures_of):
    """Print {attack: its metrics} as a table, if there are any."""
    formats = {"clean": ".1%", "aua": ".1%", "suc": ".1%", "queries": ".1f", "words_changed": ".1%"}
    formats |= {"similarity": ".3f", "without_substitute": "d"}
    if figures_of:
        print("                  Clean%    Aua%    Suc%  #Query  words changed  similarity  no substitute")
    for name, figures in figures_of.items():
        cells = ["-" if figures[column] is None else format(figures[column], form) for column, form in formats.items()]
        print("{:16s}  {:>6s}  {:>6s}  {:>6s}  {:>6s}  {:>13s}  {:>10s}  {:>13s}".format(name, *cells))


def print_change(row):
    """Print a successful attack, before and after, with the changed words marked."""
    sides = [text if isinstance(text, str) else "\n    ".join(text) for text in (row["original"], row["perturbed"])]
    before, after = (re.findall(r"\s+|\S+", side) for side in sides)
    old, new = "", ""
    for kind, i, j, k, m in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        old += mark("".join(before[i:j]), "31", kind)
        new += mark("".join(after[k:m]), "32", kind)
    sure, sure_after = (f"{max(row[key]):.0%}" for key in ("probabilities", "probabilities_after"))
    print(f"example {row['example']}, {row['queries']} queries, similarity {row['similarity']:.3f}")
    print(f"  {row['predicted']} {sure}\n    {old}")
    print(f"  {row['predicted_after']} {sure_after}\n    {new}")


def mark(text, colour, kind):
    """Changed text in colour on a terminal, else in brackets."""
    if kind == "equal" or not text.strip():
        return text
    return f"\033[{colour}m{text}\033[0m" if sys.stdout.isatty() else f"[{text}]"
