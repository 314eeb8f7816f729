"""Write tables as Markdown into docs/speed.md, with their figures in benchmarks/results. Run measured processes."""

import subprocess

from checkpoints.provenance import ROOT
from runtime import files
from runtime.cli import BadInput

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "speed.md"


def table(figures, columns):
    """{case: {figure: value}} -> lines of Markdown, a row per case. columns: {heading: format of the figures}."""
    rows = [["", *columns], ["---", *["---:"] * len(columns)]]
    rows += [[" in ".join(case), *(text.format(**row) for text in columns.values())] for case, row in figures.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = [[row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:]))] for row in rows]
    return [f"| {' | '.join(row)} |" for row in cells]


def publish(name, made, figures, lines, save):
    """Print the lines. save: also write RESULTS/NAME.json, with how it was `made`, and replace what PAGE has between
    the comments <!-- NAME --> and <!-- end -->."""
    print("\n".join(lines))
    if not save:
        return
    rows = {" in ".join(case): row for case, row in figures.items()}
    files.write_json(RESULTS / f"{name}.json", made | {"figures": rows})
    before, start, rest = PAGE.read_text("utf8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise BadInput(f"{PAGE} has no <!-- {name} --> ... <!-- end -->: the figures are in {RESULTS}/{name}.json only")
    files.write_text(PAGE, "".join([before, start, "\n".join(lines), "\n", end, after]))


def read(name):
    """What `publish` saved. Raises BadInput if there is none."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise BadInput(f"there is no {path}: python -m benchmarks.bench {name.partition('-')[0]} --save makes it")
    saved = files.read_json(path)
    if "figures" not in saved:
        raise BadInput(f"{path} does not say where it was made: make it again")
    return saved


def run_process(command, name):
    """The output of a command. Raises BadInput with the last line of its errors if it fails."""
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise BadInput(f"{name} failed: {lines[-1]}")
    return process.stdout
