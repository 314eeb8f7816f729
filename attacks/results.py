"""What attacks found: a line of JSON for each example, the figures of the paper made of them, and how both are shown.

Clean% is the accuracy on all test rows; Aua%, accuracy under attack, is failed attacks / examples; Suc% is succeeded /
(succeeded + failed); #Query the mean number of queries of an attack, failed or not. An example that the model
misclassifies from the start is not attacked, and counts in Aua% alone; one whose attack ends in an error counts
nowhere, and once the others are done the same command tries it again. The words changed and the similarity of the
sentences are means over successful attacks: a success that changes the meaning is none.
"""

import difflib
import hashlib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import filelock

from checkpoints.provenance import is_up_to_date
from runtime import files
from runtime.cli import BadInput


class Results:
    """ATTACK.jsonl, a line an example in the order in which they end, and at last in that of the sample; and
    ATTACK.json, how they were made, what they come to, and the errors. Several processes may append."""

    def __init__(self, path, provenance, name, used, sample, overwrite):
        self.path, self.sample, self.rows = path, sample, {}
        used_sha256 = hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()
        self.provenance = provenance | {"resources": used, "resources_sha256": used_sha256}
        self.provenance["settings"] = provenance["settings"] | {"attack": name}
        self.summary = path.with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(path.with_suffix(".lock"))
        with self.lock:
            if not is_up_to_date(self.summary, self.provenance, overwrite):
                path.unlink(missing_ok=True)
                files.write_json(self.summary, self.provenance)
            elif path.is_file():  # a killed run may have left half a line
                content = path.read_bytes()
                os.truncate(path, content.rfind(b"\n") + 1)
        self.read()

    def read(self):
        with self.lock:
            content = self.path.read_bytes() if self.path.is_file() else b""
        try:
            self.rows = {row["example"]: row for row in map(json.loads, content.splitlines())}
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{self.path} has a line that is none of attack.py's: delete the file") from None

    def add(self, row):
        self.rows[row["example"]] = row
        with self.lock, open(self.path, "ab") as file:
            file.write(as_line(row))

    def show(self, bar, shared):
        """Move the bar; shared: other processes write as well."""
        if shared:
            self.read()
        bar.n = len(self.rows)
        bar.set_postfix_str(f"Aua {self.figures()['aua'] or 0:.1%}")

    def figures(self):
        """The paper's figures, as shares; None where there is nothing to divide by."""
        rows = self.rows.values()
        counts = Counter(row["outcome"] for row in rows)
        failed, succeeded, skipped = counts["failed"], counts["succeeded"], counts["skipped"]
        attacked = [row for row in rows if row["outcome"] in ("failed", "succeeded")]
        changed = [row for row in rows if row["outcome"] == "succeeded"]
        return {
            "aua": failed / (len(attacked) + skipped) if attacked or skipped else None,
            "suc": succeeded / len(attacked) if attacked else None,
            "queries": mean(row["queries"] for row in attacked) if attacked else None,
            "words_changed": mean(row["words_changed"] / row["words"] for row in changed) if changed else None,
            "similarity": mean(row["similarity"] for row in changed) if changed else None,
            "outcomes": dict(counts),
        }

    def summarize(self, clean, count):
        """Write the summary and, when all examples are there, their lines in the order of the sample, but for errors,
        which the same command then tries again; print `count` successful attacks, and how many ended in which way.
        Returns the figures."""
        errors = {number: row["reason"] for number, row in self.rows.items() if row["outcome"] == "error"}
        if len(self.rows) == len(self.sample):
            with files.atomic_write(self.path) as tmp_path, open(tmp_path, "wb") as file:
                file.writelines(as_line(self.rows[number]) for number in self.sample if number not in errors)
            Path(self.lock.lock_file).unlink(missing_ok=True)
        figures = {"clean": clean, **self.figures(), "examples": len(self.rows), "errors": errors}
        files.write_json(self.summary, self.provenance | figures)
        for row in [row for row in self.rows.values() if row["outcome"] == "succeeded"][:count]:
            print_change(row)
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in sorted(figures["outcomes"].items()))
        print(f"{len(self.rows)} of {len(self.sample)} examples attacked: {outcomes or 'none'}; {self.path}")
        for number, reason in list(errors.items())[:1]:
            print(f"an error is in no figure; the first, of example {number}: {reason}")
            if figures["suc"] is None:
                raise BadInput(f"every attack ended in an error, such as {reason}: see {self.summary}")
        return figures


def as_line(row):
    return json.dumps(row, ensure_ascii=False).encode("utf8", "replace") + b"\n"


def print_table(table):
    """The figures of each attack in a line."""

    def written(value, form):
        return "-" if value is None else format(value, form)

    print("              Clean%    Aua%    Suc%  #Query  words changed  similarity")
    for name, row in table.items():
        shares = "  ".join(f"{written(row[key], '.1%'):>6s}" for key in ("clean", "aua", "suc"))
        print(f"{name:12s}  {shares}  {written(row['queries'], '.1f'):>6s}", end="  ")
        print(f"{written(row['words_changed'], '.1%'):>13s}  {written(row['similarity'], '.3f'):>10s}")


def print_change(row):
    """A successful attack, before and after, the words marked that it changed."""
    sides = [text if isinstance(text, str) else "\n    ".join(text) for text in (row["original"], row["perturbed"])]
    pieces = [re.findall(r"\s+|\S+", side) for side in sides]
    marked, colours = [[], []], ("31", "32")
    for kind, *bounds in difflib.SequenceMatcher(None, *pieces, autojunk=False).get_opcodes():
        for side, (start, end) in enumerate((bounds[:2], bounds[2:])):
            text = "".join(pieces[side][start:end])
            if kind != "equal" and text.strip():
                text = f"\033[{colours[side]}m{text}\033[0m" if sys.stdout.isatty() else f"[{text}]"
            marked[side].append(text)
    sure = [f"{max(row[key]):.0%}" for key in ("probabilities", "probabilities_after")]
    print(f"example {row['example']}, {row['queries']} queries, similarity {row['similarity']:.3f}")
    print(f"  {row['predicted']} {sure[0]}\n    {''.join(marked[0])}")
    print(f"  {row['predicted_after']} {sure[1]}\n    {''.join(marked[1])}")
