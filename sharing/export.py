"""A fine-tuned model as users of transformers know one, `finetune.py --export-hf FOLDER`: dense, with zeros where the
ticket pruned, its tokenizer and a model card beside it.

transformers cannot load layers of uneven width; what is exported computes the same and saves nothing.
"""

from pathlib import Path

from bert import Bert
from checkpoints.provenance import is_up_to_date
from runtime import files
from runtime.cli import BadInput

MADE_BY = "Made by orticket's `finetune.py`"  # how an export is known, also one that was interrupted


def find(options, source, folder, provenance):
    """Whether --export-hf has what these settings make. Raises BadInput where it cannot be written, is the folder of
    the model before or after fine-tuning, or has files that no export wrote and that --overwrite does not give up."""
    target, provenance = files.writable(Path(options.export_hf)), as_dense(provenance)
    if target.resolve() in (folder.resolve(), (source if source.is_dir() else source.parent).resolve()):
        raise BadInput(f"--export-hf {target} is the folder of the model itself: give another")
    whole = is_up_to_date(target / "model.safetensors", provenance, options.overwrite, "another --export-hf")
    written = ("README.md", "config.json", "tokenizer.json", "tokenizer_config.json")
    there = [name for name in written if (target / name).is_file()]
    card = target / "README.md"
    ours = whole or (card.is_file() and MADE_BY in card.read_text("utf8", errors="replace"))
    if there and not (ours or options.overwrite):
        raise BadInput(f"--export-hf {target}: no export wrote its {there[0]}; give another folder, or --overwrite")
    return whole


def write(target, folder, masks, tokenizer, task, provenance):
    """Write the model in `folder` to `target`, dense where it was pruned by `masks`, and what belongs beside it."""
    model = Bert.load(folder)
    if masks is not None:
        model = model.dense(*masks)
    with files.atomic_write(target / "README.md") as tmp_path:
        Path(tmp_path).write_text(model_card(files.read_json(folder / "metrics.json"), task), "utf8")
    tokenizer.save(target)
    model.save(target, task.labels, as_dense(provenance))


def as_dense(provenance):
    """How an export was made; what finetune.py leaves in the folder of a run is none, and may be narrow."""
    return provenance | {"settings": provenance["settings"] | {"export": "dense"}}


def model_card(metrics, task):
    """How the model was made, for whoever finds it on the hub."""
    settings = metrics["settings"]
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
        f"{MADE_BY}, after *ORTicket: Let One Robust BERT Ticket Transfer across Different\n"
        "Tasks* (LREC-COLING 2024). The weights are dense: what the ticket pruned is zero, and stays in the sizes.\n\n"
        f"| | |\n|---|---|\n{table}\n\nAll settings are in the header of `model.safetensors`.\n"
    )
