"""What search.py trains on: blocks of a corpus, or the rows of a task."""

import data
from inputs.batches import Blocks, TokenizedSplit, rows_sha256
from runtime import cli
from runtime.cli import BadInput


def load_examples(options, tokenizer, config, device):
    """(Blocks of the corpus or TokenizedSplit of the task, number of classes or 0, sha256 of the examples)."""
    if options.objective == "mlm":
        if columns := cli.flags(options, *data.COLUMN_OPTIONS):
            raise BadInput(f"{columns.strip()} needs a custom task as --objective: a corpus has no columns")
        if options.block > config.max_length:
            raise BadInput(f"--block {options.block}: {options.model} reads at most {config.max_length} tokens")
        corpus = data.find_corpus(options.corpus, options.data_revision, options.encoding)
        blocks = Blocks(tokenizer, *corpus, options.block, device)
        print(f"corpus {options.corpus}: {len(blocks):,} blocks of {options.block} tokens")
        return blocks, 0, blocks.sha256
    task = data.find_task(options.objective, tuple(options.text_columns), options.label_column, options.drop_labels)
    rows, max_length = task.load(options.data_revision)["train"], min(task.max_length, config.max_length)
    split = TokenizedSplit(tokenizer, rows, max_length, device)
    print(f"task {options.objective}: {len(split):,} training rows")
    return split, len(task.labels), rows_sha256(tokenizer, max_length, rows)
