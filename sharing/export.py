"""Export of a fine-tuned model for transformers users: `finetune.py --export-hf FOLDER`.

transformers cannot load layers of uneven width. So an export is dense, with zeros where the ticket pruned: the logits
are the same, the size is that of the full model. Its tokenizer and a model card are written beside it.
"""

from pathlib import Path

from bert import Bert
from checkpoints.provenance import is_up_to_date, without_paths
from checkpoints.runs import read_metrics
from runtime import files
from runtime.cli import BadInput
from runtime.distributed import file_lock

SIGNATURE = "Made by orticket's `finetune.py`"  # identifies an export by its model card, even a partial one
DONE = "for transformers, with zeros where the ticket pruned: {}"


def is_exported(options, source, masks, folder, provenance):
    """Whether --export-hf already holds the export of the run with this provenance.

    source, folder: the model before and after fine-tuning. masks: of its ticket, the pair (head mask, FFN mask) or
    none. Raises BadInput if the model cannot be exported, or if the target cannot be written, is the folder of one of
    these models, or has files that no export wrote, without --overwrite.
    """
    if not isinstance(masks, tuple) and Bert.load(source).config.is_pruned:
        raise BadInput(f"{options.model} was pruned by unknown masks: it cannot be exported as a dense model")
    target = files.writable(Path(options.export_hf))
    if target.resolve() in (folder.resolve(), (source if source.is_dir() else source.parent).resolve()):
        raise BadInput(f"--export-hf {target} is the folder of the model itself: give another")
    provenance, card = dense_provenance(provenance), target / "README.md"
    if is_up_to_date(target / "model.safetensors", provenance, options.overwrite, "another --export-hf"):
        print(DONE.format(target))
        return True
    may_replace = options.overwrite or (card.is_file() and SIGNATURE in card.read_text("utf8", errors="replace"))
    for name in ("README.md", "config.json", "tokenizer.json", "tokenizer_config.json"):
        if (target / name).is_file() and not may_replace:
            raise BadInput(f"--export-hf {target}: no export wrote its {name}; give another folder, or --overwrite")
    return False


def export(options, source, folder, masks, tokenizer, task, provenance):
    """Write the model in `folder` to --export-hf, dense where it was pruned, with tokenizer and model card."""
    target, model = Path(options.export_hf), Bert.load(folder)
    if model.config.is_pruned:
        model = model.dense(*masks)
    with file_lock(target / "model.safetensors"):
        if not is_exported(options, source, masks, folder, provenance):  # another command may have written there
            files.write_text(target / "README.md", model_card(read_metrics(folder), task))
            tokenizer.save(target)
            model.save(target, task.labels, dense_provenance(provenance))
            print(DONE.format(target))


def dense_provenance(provenance):
    """Distinguishes an export from the model in a run's folder, which may be pruned. Contains no local path."""
    return provenance | {"settings": without_paths(provenance["settings"]) | {"export": "dense"}}


def model_card(metrics, task):
    """The README.md of an export: how the model was trained."""
    settings = without_paths(metrics["settings"])
    rows = {
        "task": f"{settings['task']}: {', '.join(task.labels)}",
        "pre-trained model": f"{settings['model']}, sha256 {metrics['model_sha256']}",
        "ticket": f"{settings['ticket']}, sha256 {metrics['ticket_sha256']}",
        "method": f"{settings['method']}, seed {settings['seed']}, {settings['epochs']} epochs",
        "test accuracy": f"{metrics['test_accuracy']:.2%} of {metrics['test_rows']:,} rows",
        "parameters that are not pruned": f"{metrics['parameters']:,}",
        "packages": ", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-classification\n---\n\n"
        f"# {Path(settings['model']).name} fine-tuned on {settings['task']}\n\n"
        f"{SIGNATURE}, after *ORTicket: Let One Robust BERT Ticket Transfer across Different Tasks*\n"
        "(LREC-COLING 2024). The weights are dense: pruned weights are zeros.\n\n"
        f"| | |\n|---|---|\n{table}\n\nAll settings are in the header of `model.safetensors`.\n"
    )
