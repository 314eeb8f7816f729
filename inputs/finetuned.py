"""Load a model that finetune.py wrote, and check that it belongs to the rows at hand."""

import math
from dataclasses import asdict

import data
from bert import Bert
from checkpoints import safetensors
from inputs.batches import rows_sha256
from inputs.tokenizer import Tokenizer
from runtime.cli import BadInput


def load_finetuned(folder, task, splits, options, device):
    """(model, tokenizer, tokens to which a text is truncated, metadata) of the fine-tuned model in `folder`.

    splits: the rows of options.task. Raises BadInput if the model was fine-tuned on other rows: its accuracy would not
    be theirs, and its training rows could be their test rows. A custom file may have changed, or have a namesake.
    """
    model, tokenizer = Bert.load(folder).to(device), Tokenizer(folder)
    metadata = safetensors.read_with_metadata(folder / "model.safetensors", "finetune.py")[1]
    config = {
        key: value for key, value in asdict(model.config).items() if key not in ("num_labels", "heads", "neurons")
    }
    if not config.items() <= metadata.get("config", config).items():
        raise BadInput(f"{folder}/config.json is not that of model.safetensors: fine-tune again with --overwrite")
    max_length = min(metadata["settings"]["max_length"] or task.max_length, model.config.max_length)
    count = min(metadata["settings"]["train_rows"] or math.inf, len(splits["train"]))
    trained = splits | {"train": data.first_rows(splits["train"], count, options.task)}
    if rows_sha256(tokenizer, max_length, *trained.values()) != metadata["task_sha256"]:
        remedy = "use its --text-columns, --label-column and --data-revision, or fine-tune with --overwrite"
        raise BadInput(f"{folder} was fine-tuned on other rows than those of {options.task}: {remedy}")
    return model, tokenizer, max_length, metadata
