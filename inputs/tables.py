"""Files of rows: custom tasks (CSV, TSV, JSON lines), the hub's parquet files, and the lines of a text corpus.

A custom file is either read completely or rejected with the number of the wrong line.
"""

import csv
import io
import json
import re
from collections import Counter

import charset_normalizer
import pyarrow
import pyarrow.parquet
from charset_normalizer.utils import identify_sig_or_bom

from runtime.cli import BadInput, first_few

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
SPLITS = {name: "validation" for name in ("validation", "val", "valid", "dev")} | {"train": "train", "test": "test"}
UTF8 = "utf-8-sig"  # with or without a byte-order mark


def table_files(path):
    """{split: file} of a folder with train.csv, test.csv and optionally validation.csv (or .tsv, .jsonl, .json).

    See SPLITS for other names; every name may be a plural. Prints which tables are not used.
    """
    files = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in SUFFIXES:
            files.setdefault(SPLITS.get(file.stem.lower().removesuffix("s")), []).append(file)
    unused = files.pop(None, [])
    for first, *others in files.values():
        if others:
            raise BadInput(f"{path} is not a task: it has both {first.name} and {others[0].name}")
    if not {"train", "test"} <= files.keys():
        raise BadInput(f"{path} is not a task: it has no train.csv and test.csv (or {', '.join(SUFFIXES[1:])})")
    if unused:
        print(f"{path}: not used: {first_few(repr(file.name) for file in unused)}")
    return {split: file for split, (file,) in files.items()}


def read_table(path, text_columns, label_column):
    """[(line, tuple of texts, label as text)] of a CSV, TSV or JSON-lines file with these columns."""
    raw, suffix = path.read_bytes(), path.suffix.lower()
    encoding = marked_encoding(raw)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line, name = raw[: error.start].count(b"\n") + 1, encoding.removesuffix("-sig").upper()
        raise BadInput(f"{path} line {line} is not {name}{guess(raw)}: save the file as UTF-8") from None
    columns = *text_columns, label_column
    records = json_lines(path, text) if suffix in (".jsonl", ".json") else separated(path, text, suffix, columns)
    rows, empty = [], []
    for line, record in records:
        for column in columns:
            if column not in record:
                option = "--label-column" if column == label_column else "--text-columns"
                there = f"only {first_few(map(repr, record))}: name one with {option}"
                raise BadInput(f"{path} line {line} has no column {column!r}, {there}")
        texts, label = tuple(record[column] for column in text_columns), record[label_column]
        if label is None or isinstance(label, (dict, list, float)) or not str(label).strip():
            reason = f"{label!r:.200} is not a word or an integer"
            raise BadInput(f"{path} line {line} has no label in {label_column!r}: {reason}")
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


def separated(path, text, suffix, columns):
    """Yield (line, {column: field}) for each row of a CSV or TSV file. In a TSV file, as in GLUE's, quotes are text.

    The separator of a CSV file is the one that gives a header with these columns, or else with the most columns.
    """
    csv.field_size_limit(2**30)
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise BadInput(f"{path} line {line} has a NUL character: save the file as UTF-8")
    if suffix == ".csv":
        headers = {of: next(csv.reader(io.StringIO(text, newline=""), delimiter=of), []) for of in ",;\t|"}
        separator = max(headers, key=lambda of: (set(columns) <= set(headers[of]), len(headers[of])))
        dialect = {"delimiter": separator}
        if separator != ",":
            print(f"{path}: the columns are separated by {separator!r}")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    repeated, quoted, row_start = [], 0, 1
    try:
        header = next(reader, [])
        for column, count in Counter(header).items():
            if column and count > 1:
                raise BadInput(f"{path} has the column {column!r:.200} twice: rename one")
        row_start = reader.line_num + 1  # of the next row
        for fields in reader:
            row_start = reader.line_num + 1
            if fields == header:
                repeated.append(reader.line_num)
            elif fields and len(fields) != len(header):
                raise BadInput(f"{path} line {reader.line_num} has {len(fields)} fields, the header {len(header)}")
            elif fields:
                quoted += suffix == ".tsv" and any(re.fullmatch('"([^"]|"")*"', field) for field in fields)
                yield reader.line_num, dict(zip(header, fields))
    except csv.Error as error:
        remedy = "double the quotes inside a quoted field, and write nothing after the closing quote"
        raise BadInput(f"{path}, the row that starts in line {row_start}: {error}; {remedy}") from None
    if repeated:
        print(f"{path}: the header is repeated in line {repeated[0]}; {len(repeated)} such lines are left out")
    if quoted:
        what = "have a quoted field: in a .tsv file the quotes are part of the text, in a .csv file they are not"
        print(f"{path}: {quoted:,} rows {what}")


def json_lines(path, text):
    """Yield (line, record) for each non-blank line of a JSON-lines file."""
    if text.lstrip().startswith("["):
        raise BadInput(f"{path} is one JSON list: write JSON lines, one object per line")
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


def marked_encoding(raw):
    """The encoding given by a byte-order mark in a file's first bytes; UTF-8 without one."""
    encoding, _ = identify_sig_or_bom(raw)
    return UTF8 if encoding in (None, "utf_8") else encoding


def guess(raw):
    """', perhaps ENCODING' for bytes that are not UTF-8, if it can be detected."""
    best = charset_normalizer.from_bytes(raw[: 2**16]).best()
    return f", perhaps {best.encoding}" if best else ""


def corpus_encoding(path):
    """`marked_encoding` of a text file. Raises BadInput if many bytes of its first megabyte are not UTF-8."""
    with open(path, "rb") as file:
        raw = file.read(2**20)
    encoding = marked_encoding(raw)
    if encoding == UTF8:
        invalid = re.findall("[\0\udc80-\udcff]", raw.decode("utf8", errors="surrogateescape"))
        if len(invalid) > len(raw) / 100:
            raise BadInput(f"{path} is not UTF-8{guess(raw)}: give a text file, and --encoding if it is not UTF-8")
    return encoding


def read_lines(encodings):
    """Yield the non-blank lines of text files {path: encoding}. Lines of more than a megabyte are split."""
    replaced = 0
    for path, encoding in encodings.items():
        try:
            with open(path, encoding=encoding, errors="surrogateescape" if encoding == UTF8 else "strict") as file:
                while line := file.readline(2**20):
                    line, count = re.subn("[\ud800-\udfff]", "\ufffd", line)
                    replaced += count
                    if line.strip():
                        yield line
        except (LookupError, UnicodeError) as error:
            raise BadInput(f"{path} is not text in the encoding {encoding}: {error}; check --encoding") from None
    if replaced:
        print(f"{replaced:,} bytes of the corpus are not UTF-8; each is replaced by U+FFFD")
