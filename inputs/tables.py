"""Files of rows: custom tasks (CSV, TSV, JSON lines), the hub's parquet files, and the lines of a text corpus.

A custom file is read completely, or refused with the number of the line that is wrong.
"""

import csv
import io
import json
import re

import pyarrow
import pyarrow.parquet

from runtime.cli import BadInput

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")


def table_files(path):
    """{split: file} of a folder with train.csv, test.csv and optionally validation.csv (or .tsv, .jsonl, .json).

    Raises BadInput if train or test is missing, or if a split has two files.
    """
    files = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in SUFFIXES and file.stem in ("train", "validation", "test"):
            if file.stem in files:
                raise BadInput(f"{path} is not a task: it has both {files[file.stem].name} and {file.name}")
            files[file.stem] = file
    if not {"train", "test"} <= files.keys():
        raise BadInput(f"{path} is not a task: it has no train.csv and test.csv (or {', '.join(SUFFIXES[1:])})")
    return files


def read_table(path, text_columns, label_column):
    """[(line, tuple of texts, label as text)] of a CSV, TSV or JSON-lines file with these columns.

    Raises BadInput, with the line's number, for bytes that are not UTF-8, a line with too many or too few fields, and a
    row without a text or a label. Prints how many repeated headers are left out, and how many texts are empty.
    """
    raw, suffix = path.read_bytes(), path.suffix.lower()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadInput(f"{path} line {line} is not UTF-8: save the file as UTF-8") from None
    records = json_lines(path, text) if suffix in (".jsonl", ".json") else separated(path, text, suffix)
    rows, empty = [], []
    for line, record in records:
        for column in (*text_columns, label_column):
            if column not in record:
                raise BadInput(f"{path} line {line} has no column {column!r}, only {', '.join(map(repr, record))}")
        texts, label = tuple(record[column] for column in text_columns), record[label_column]
        if label is None or isinstance(label, (dict, list, float)) or not str(label).strip():
            raise BadInput(f"{path} line {line} has no label in {label_column!r}: {label!r} is no word or integer")
        if not all(isinstance(text, str) for text in texts):
            raise BadInput(f"{path} line {line} has no text in column {text_columns[0]!r}: {texts!r}"[:200])
        if not all(text.strip() for text in texts):
            empty.append(line)
        rows.append((line, texts, str(label).strip()))
    if not rows:
        raise BadInput(f"{path} has no rows")
    if empty:
        print(f"{path}: {len(empty):,} rows with an empty text (the first in line {empty[0]}) are kept")
    return rows


def separated(path, text, suffix):
    """Yield (line, {column: field}) for each row of a CSV or TSV file. In a TSV file, as in GLUE's, quotes are text."""
    csv.field_size_limit(2**30)
    dialect = {} if suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise BadInput(f"{path} line {line} has a NUL character: save the file as UTF-8")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    repeated, row_start = [], 1
    try:
        header = next(reader, [])
        for column in header:
            if column and header.count(column) > 1:
                raise BadInput(f"{path} has the column {column!r} twice: rename one")
        row_start = reader.line_num + 1  # of the next row
        for fields in reader:
            row_start = reader.line_num + 1
            if fields == header:
                repeated.append(reader.line_num)
            elif fields and len(fields) != len(header):
                raise BadInput(f"{path} line {reader.line_num} has {len(fields)} fields, the header {len(header)}")
            elif fields:
                yield reader.line_num, dict(zip(header, fields))
    except csv.Error as error:
        remedy = "write quotes inside a quoted field twice, and nothing after the closing quote"
        raise BadInput(f"{path}, the row that starts in line {row_start}: {error}; {remedy}") from None
    if repeated:
        print(f"{path}: the header is repeated in line {repeated[0]}; {len(repeated)} such lines are left out")


def json_lines(path, text):
    """Yield (line, record) for each line of a JSON-lines file that is not blank."""
    if text.lstrip().startswith("["):
        raise BadInput(f"{path} is one JSON list: write JSON lines, one object a line")
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path} line {line} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise BadInput(f"{path} line {line} is not a JSON object with columns")
        for column, value in record.items():
            if isinstance(value, str):  # truncated texts may end in half a surrogate pair
                record[column] = re.sub("[\ud800-\udfff]", "\ufffd", value)
        yield line, record


def read_parquet(path, *columns):
    """The values of these columns, one list each; null becomes an empty text."""
    try:
        table = pyarrow.parquet.read_table(path, columns=list(columns))
        return [["" if value is None else value for value in table[column].to_pylist()] for column in columns]
    except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not a parquet file with {', '.join(columns)}: {error}; delete it") from None


def read_lines(files):
    """Yield the lines of text files that are not blank. A line longer than a megabyte comes in pieces."""
    replaced = 0
    for path in files:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            while line := file.readline(2**20):
                line, count = re.subn("[\udc80-\udcff]", "\ufffd", line)
                replaced += count
                if line.strip():
                    yield line
    if replaced:
        print(f"{replaced:,} bytes of the corpus are not UTF-8; each is replaced by U+FFFD")
