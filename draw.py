"""Algorithm 2, lines 1 to 5: draw a task's ticket, the masks m, from the searched coefficients.

    python draw.py --task sst2                             with the paper's ratios for SST-2
    python draw.py --task mine.csv --tau-ffn 0.25
    python draw.py --coefficients OWNER/NAME               with coefficients from the hub

The heads and neurons with the smallest coefficients over all layers are pruned, except that every layer keeps at least
one head. All tasks share the coefficients and differ only in the pruning ratio of the neurons, so no data and no model
are needed here. finetune.py continues with line 6: it applies the masks to theta_0. If no search was run, the published
coefficients of MiniLM are used.
"""

import runtime.start  # noqa: F401 # isort: skip

from dataclasses import dataclass, replace
from pathlib import Path

import torch

import data
from bert import Bert, Config
from checkpoints import safetensors
from checkpoints.provenance import is_up_to_date, software
from gates import draw_masks
from runtime import cli, distributed, files
from runtime.cli import BadInput, option
from runtime.device import DEFAULT_MODEL
from sharing.plots import plot_ticket
from sharing.publish import load_coefficients


@dataclass
class Options:
    task: str = option("rt", f"sets tau_F: {', '.join(data.TASKS)}; 0.2 for a custom file", group="pruning")
    tau_head: float = option(1 / 6, "pruning ratio of the heads", at_least=0, below=1, group="pruning")
    tau_ffn: float = option(None, "pruning ratio of the neurons [the task's]", at_least=0, below=1, group="pruning")
    model: str = option(DEFAULT_MODEL, "the model that was searched", group="files")
    coefficients: str = option(None, "a file, a folder, or OWNER/NAME on the hub [that in OUTPUT/MODEL]", group="files")
    coefficients_seed: int = option(None, "seed of the search, if the file has several [the first]", group="files")
    output: str = option("runs", "folder; the ticket goes to OUTPUT/MODEL/TASK", group="files")
    overwrite: bool = option(False, "replace an existing ticket", group="files")


def main():
    options = cli.parse(Options, __doc__)
    task = data.TASKS.get(options.task)
    if task is None and not Path(options.task).exists() and options.tau_ffn is None:
        known = ", ".join(data.TASKS)
        raise BadInput(f"unknown task {options.task!r}: give one of {known}, a file, or also --tau-ffn")
    default, classes = (task.tau_ffn, len(task.labels)) if task else (data.Task.tau_ffn, 2)
    tau_ffn = default if options.tau_ffn is None else options.tau_ffn
    folder = files.model_folder(options.output, options.model) / files.task_folder(options.task)
    head, ffn, metadata = load_coefficients(options, folder.parent)
    model, seed = metadata["settings"]["model"], metadata["settings"]["seed"]

    # Lines 1 to 5: m is 0 for the ceil(tau N) smallest coefficients
    head_mask, ffn_mask = draw_masks(head, ffn, options.tau_head, tau_ffn)

    provenance = {
        "script": "draw.py",
        "settings": {"task": options.task, "tau_head": options.tau_head, "tau_ffn": tau_ffn, "coefficients_seed": seed},
        "model_sha256": metadata["model_sha256"],
        "coefficients_sha256": metadata["sha256"],
        "coefficients_provenance": {
            key: metadata.get(key) for key in ("settings", "corpus_sha256", "code", "versions", "source")
        },
        **software(__file__),
    }
    ticket, plot = folder / "ticket.safetensors", folder / "ticket.png"
    title = f"{model}, ticket for {options.task}: tau_H = {options.tau_head:.3g}, tau_F = {tau_ffn:.3g}"
    with distributed.file_lock(files.writable(folder) / ticket.name):
        if not is_up_to_date(ticket, provenance, options.overwrite):
            safetensors.write_safetensors(ticket, {"head": head_mask, "ffn": ffn_mask}, provenance)
        plot_ticket(head, ffn, head_mask, ffn_mask, title, plot)
    print(title)
    warn_of_ties(head, head_mask, "heads")
    warn_of_ties(ffn, ffn_mask, "neurons")
    report(head_mask, ffn_mask, Config(**metadata["config"] | {"num_labels": classes}))
    print(f"ticket: {ticket}, heat map: {plot}")


def warn_of_ties(coefficients, mask, name):
    """Print a line if more than 1 % of the entries are kept although their coefficient equals the largest pruned one,
    as after a search in which c stayed 1: `search.py --learning-rate-c 0`."""
    if not mask.all() and (ties := int((coefficients[mask] == coefficients[~mask].max()).sum())) > 0.01 * mask.numel():
        print(f"{ties:,} of the kept {name} have the same coefficient as a pruned one: ties are pruned by position")


def report(head_mask, ffn_mask, config):
    """Print what the masks keep in each layer, and the number of parameters before and after."""
    columns = "  ".join(f"{layer + 1:5}" for layer in range(len(head_mask)))
    print(f"  kept in layer   {columns}     out of    total")
    for name, mask in (("heads", head_mask), ("neurons", ffn_mask)):
        row = "  ".join(f"{kept:5,}" for kept in mask.sum(1).tolist())
        print(f"  {name:15s} {row}    {mask.shape[1]:7,}   {int(mask.sum()):,} of {mask.numel():,}")
    before, after = count_parameters(config), count_parameters(config, head_mask, ffn_mask)
    print(f"parameters with {config.num_labels} classes: {before:,} before, {after:,} after ({after / before:.1%})")


def count_parameters(config, head_mask=None, ffn_mask=None):
    """The number of parameters of a Bert with pooler and classifier, before or after pruning by the masks."""
    if head_mask is not None:
        config = replace(config, heads=tuple(head_mask.sum(1).tolist()), neurons=tuple(ffn_mask.sum(1).tolist()))
    with torch.device("meta"):
        return sum(p.numel() for p in Bert(config).parameters())


if __name__ == "__main__":
    cli.run(main)
