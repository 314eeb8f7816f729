"""One's own rows: CSV, TSV and JSON-lines files, read whole or refused with the number of the line that is wrong."""

import csv
import io
import json
import re
from pathlib import Path

from runtime.cli import BadInput

FILES = (".csv", ".tsv", ".jsonl", ".json")


def read_table(path, text_columns, label_column):
    """[(line, tuple of texts, label as text)] of a CSV, TSV or JSON-lines file with these columns.

    Raises BadInput, with the line's number, for what is not UTF-8, for a line with too many or too few fields, and for
    a row without a label or whose text is no text. A header that comes again is left out, and that is printed.
    """
    raw, kind = Path(path).read_bytes(), path.suffix.lower()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadInput(f"{path} line {line} is not UTF-8: save the file as UTF-8") from None
    records = json_lines(path, text) if kind in (".jsonl", ".json") else separated(path, text, kind)
    rows, empty = [], []
    for line, record in records:
        for column in (*text_columns, label_column):
            if column not in record:
                raise BadInput(f"{path} line {line} has no column {column!r}, but {', '.join(map(repr, record))}")
        texts, label = tuple(record[column] for column in text_columns), record[label_column]
        if kind in (".jsonl", ".json"):  # which may name half of a surrogate pair, as texts cut at a length have
            texts = tuple(re.sub("[\ud800-\udfff]", "\ufffd", of) if isinstance(of, str) else of for of in texts)
        if label is None or isinstance(label, (dict, list, float)) or not str(label).strip():
            wanted = "a word or an integer is wanted"
            raise BadInput(f"{path} line {line} has no label in column {label_column!r}: {label!r}; {wanted}")
        if not all(isinstance(text, str) for text in texts):
            raise BadInput(f"{path} line {line} has no text in column {text_columns[0]!r}: {texts!r}"[:200])
        if not all(text.strip() for text in texts):
            empty.append(line)
        rows.append((line, texts, str(label).strip()))
    if not rows:
        raise BadInput(f"{path} has no rows")
    if empty:
        print(f"{path}: {len(empty):,} rows with an empty text (the first in line {empty[0]}); they are kept")
    return rows


def separated(path, text, kind):
    """(line, {column: field}) of each row of a CSV or TSV file; what a quote is in the one is a letter in the other, as
    in GLUE's."""
    csv.field_size_limit(2**30)
    dialect = {} if kind == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise BadInput(f"{path} line {line} has a NUL character: save the file as UTF-8, without any")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    header, repeated, begins = None, [], 1
    try:
        for fields in reader:
            begins = reader.line_num + 1  # of the next row
            if header is None:
                header = fields
                twice = {column for column in header if column and header.count(column) > 1}
                if twice:
                    raise BadInput(f"{path} has the column {min(twice)!r} twice: rename one")
            elif fields == header:
                repeated.append(reader.line_num)
            elif fields and len(fields) != len(header):
                raise BadInput(f"{path} line {reader.line_num} has {len(fields)} fields, the header {len(header)}")
            elif fields:
                yield reader.line_num, dict(zip(header, fields))
    except csv.Error as error:
        remedy = "a quote within a quoted field is written twice, and nothing follows the closing one"
        raise BadInput(f"{path}, the row that begins in line {begins}: {error}; {remedy}") from None
    if repeated:
        print(f"{path}: the header comes again in line {repeated[0]}: {len(repeated)} such lines are left out")


def json_lines(path, text):
    """(line, record) of each line of a JSON-lines file that is not blank."""
    if text.lstrip().startswith("["):
        raise BadInput(f"{path} is one JSON list: JSON lines are wanted, an object a line")
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                record = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path} line {line} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise BadInput(f"{path} line {line} is no JSON object with columns")
            yield line, record
