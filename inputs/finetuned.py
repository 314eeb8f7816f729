"""Load a model of finetune.py, check that it was trained on the given rows, and count correct rows per class."""

import math
from dataclasses import asdict, replace
from itertools import islice

import torch

from bert import Bert
from checkpoints import safetensors
from checkpoints.provenance import note_other_code
from inputs.batches import rows_sha256
from inputs.splits import first_rows
from inputs.tokenizer import Tokenizer
from runtime import distributed
from runtime.cli import BadInput, progress
from runtime.device import autocast


def load_finetuned(folder, task, splits, options, device):
    """(model, tokenizer, maximum tokens per text, metadata) of the fine-tuned model in `folder`.

    splits: the rows of options.task. Raises BadInput if the model was fine-tuned on other rows, for example because the
    file has changed or another file has the same name: its training rows could include these test rows.
    """
    model, tokenizer = Bert.load(folder).to(device), Tokenizer(folder)
    metadata = safetensors.read_with_metadata(folder / "model.safetensors", "finetune.py")[1]
    config = asdict(replace(model.config, num_labels=0, heads=None, neurons=None))
    if config != metadata.get("config", config) | {"num_labels": 0, "heads": None, "neurons": None}:
        raise BadInput(f"{folder}/config.json does not match model.safetensors: fine-tune again with --overwrite")
    max_length = min(metadata["settings"]["max_length"] or task.max_length, model.config.max_length)
    count = min(metadata["settings"]["train_rows"] or math.inf, len(splits["train"]))
    trained = splits | {"train": first_rows(splits["train"], count, options.task)}
    if rows_sha256(tokenizer, max_length, *trained.values()) != metadata["task_sha256"]:
        remedy = "use its columns, --drop-labels and --data-revision, or fine-tune with --overwrite"
        raise BadInput(f"{folder} was fine-tuned on other rows than those of {options.task}: {remedy}")
    note_other_code(folder / "model.safetensors", metadata)
    return model, tokenizer, max_length, metadata


@torch.inference_mode()
def correct_by_class(model, split, batch_size, dtype):
    """(classes,): how many rows of each class the model classifies correctly. The processes share the batches."""
    model.eval()
    correct = torch.zeros(model.config.num_labels, device=split.device)
    bar = progress(len(split.labels), description="classify", unit="row")
    with bar, autocast(split.device, dtype):  # once: it rounds the weights
        for batch in islice(split.batches(batch_size), distributed.RANK, None, distributed.WORLD):
            logits = model.class_logits(batch.ids, batch.attention_mask, batch.segments)
            correct += batch.labels[logits.argmax(1) == batch.labels].bincount(minlength=len(correct))
            bar.update(len(logits) * distributed.WORLD)
    return distributed.all_reduce_sum(correct).cpu()


def rare_class_metrics(model, splits, labels, batch_size, dtype):
    """{"test_correct_by_class": {class: [correct test rows, test rows]}} if a class is rare; {} otherwise.

    A class is rare if it has less than a tenth of the training rows, and less than half of the mean per class.
    """
    train, test = (splits[name].labels.bincount(minlength=len(labels)) for name in ("train", "test"))
    if train.min() * max(10, 2 * len(labels)) >= train.sum():
        return {}
    correct = correct_by_class(model, splits["test"], batch_size, dtype).long()
    return {"test_correct_by_class": dict(zip(labels, torch.stack([correct, test], 1).tolist()))}
