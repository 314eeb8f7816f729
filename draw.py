"""Draw a task's ticket from the searched coefficients (Algorithm 2, lines 1-6): prune the least important heads and
neurons of all layers together, keep at least one head a layer.

    python draw.py --task sst2             the paper's ratios for SST-2
    python draw.py --task mine --tau-ffn 0.25

It needs no data and no model: the coefficients' file knows the model's sizes. All tasks share the coefficients and
differ in the ratio alone.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bert import Bert, Config
from checkpoints import safetensors
from checkpoints.provenance import versions
from gates import draw_masks
from runtime import cli, files
from runtime.cli import BadInput, option
from runtime.device import DEFAULT_MODEL

# task -> (tau_ffn, classes): section 3.5 and Table 2 for the paper's five; imdb-embedded as imdb, the others 0.2
TASKS = {
    "sst2": (0.2, 2),
    "qqp": (0.2, 2),
    "qnli": (0.3, 2),
    "imdb": (0.3, 2),
    "agnews": (0.3, 4),
    "rt": (0.2, 2),
    "bbc": (0.2, 5),
    "imdb-embedded": (0.3, 2),
}


@dataclass
class Options:
    task: str = option("rt", f"gives the ratios: {', '.join(TASKS)}; a file of one's own: 0.2")
    model: str = option(DEFAULT_MODEL, "the model that was searched")
    output: str = option("runs", "folder that search.py wrote to; the ticket goes to OUTPUT/MODEL/TASK")
    coefficients: str = option(None, "a coefficients file elsewhere")
    tau_head: float = option(1 / 6, "pruning ratio of the heads, the same for all tasks", at_least=0, below=1)
    tau_ffn: float = option(None, "pruning ratio of the FFN neurons, instead of the task's", at_least=0, below=1)


def main():
    options = cli.parse(Options, __doc__)
    known = options.task in TASKS or Path(options.task).exists()
    if not known and options.tau_ffn is None:
        raise BadInput(f"unknown task {options.task!r}: give one of {', '.join(TASKS)}, a file, or --tau-ffn as well")
    tau_ffn, classes = TASKS.get(options.task, (0.2, 2))
    tau_ffn = tau_ffn if options.tau_ffn is None else options.tau_ffn
    folder = files.model_folder(options.output, options.model) / files.task_folder(options.task)
    path = Path(options.coefficients or folder.parent / "coefficients.safetensors")
    if not path.is_file():
        raise BadInput(f"{path} is not there: python search.py{cli.flags(options, 'model', 'output')} makes it")
    head, ffn, metadata = read_coefficients(path)
    searched = metadata["settings"]["model"]
    if files.model_folder("", searched) != files.model_folder("", options.model):
        raise BadInput(f"{path} are the coefficients of model {searched}: --model {searched} draws from them")

    head_mask, ffn_mask = draw_masks(head, ffn, options.tau_head, tau_ffn)
    provenance = {
        "script": "draw.py",
        "settings": {"task": options.task, "tau_head": options.tau_head, "tau_ffn": tau_ffn},
        "model_sha256": metadata["model_sha256"],
        "coefficients_sha256": files.sha256(path),
        "coefficients_made_by": {key: metadata[key] for key in ("settings", "corpus_sha256", "versions")},
        "versions": versions(),
    }
    ticket = folder / "ticket.safetensors"
    safetensors.write_safetensors(ticket, {"head": head_mask, "ffn": ffn_mask}, provenance)
    title = f"{searched}, ticket for {options.task}: tau_H = {options.tau_head:.3g}, tau_F = {tau_ffn:.3g}"
    heat_map(head, ffn, head_mask, ffn_mask, title, folder / "ticket.png")

    config = Config(**metadata["config"] | {"num_labels": classes})
    before, after = count_parameters(config), count_parameters(config, head_mask, ffn_mask)
    print(title)
    print(f"  kept in layer   {'  '.join(f'{i + 1:5}' for i in range(len(head)))}    of each   in all")
    for name, mask in (("heads", head_mask), ("neurons", ffn_mask)):
        row = "  ".join(f"{kept:5,}" for kept in mask.sum(1).tolist())
        print(f"  {name:15s} {row}    {mask.shape[1]:7,}   {int(mask.sum()):,} of {mask.numel():,}")
    print(f"parameters with {classes} classes: {before:,} before, {after:,} after ({after / before:.1%})")
    print(f"ticket: {ticket}, heat map: {folder / 'ticket.png'}")


def read_coefficients(path):
    """(c_H (layers, heads), c_F (layers, neurons), notes) of a file that search.py wrote.

    Raises BadInput where the file is something else, or its shapes are not those of its model.
    """
    tensors, metadata = safetensors.read_with_metadata(path)
    try:  # somebody else's, perhaps
        config, known = (
            Config(**metadata["config"]),
            metadata["script"] == "search.py" and {"head", "ffn"} <= tensors.keys(),
        )
        known = known and isinstance(metadata["settings"]["model"], str)
        known = known and {"model_sha256", "corpus_sha256", "versions"} <= metadata.keys()
    except (KeyError, TypeError):
        known = False
    if not known:
        raise BadInput(f"{path} holds no coefficients: give a file that search.py wrote")
    for name, width in (("head", config.num_attention_heads), ("ffn", config.intermediate_size)):
        expected, found = (config.num_hidden_layers, width), tensors[name]
        if found.shape != expected or found.dtype != torch.float32 or not torch.isfinite(found).all():
            raise BadInput(f"{path}: {name} is not a finite float32 for each of {expected}: search again")
    return tensors["head"], tensors["ffn"], metadata


def count_parameters(config, head_mask=None, ffn_mask=None):
    """How many parameters a Bert of these sizes has, pooler and classifier included, before or after pruning."""
    if head_mask is not None:
        config = replace(config, heads=tuple(head_mask.sum(1).tolist()), neurons=tuple(ffn_mask.sum(1).tolist()))
    with torch.device("meta"):
        return sum(p.numel() for p in Bert(config).parameters())


def heat_map(head, ffn, head_mask, ffn_mask, title, picture):
    """What survives of each layer, after Figure 1: every head with its coefficient, and the share of the neurons."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers, heads = head.shape
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 1.6 + 0.36 * layers), width_ratios=(heads, 8), layout="constrained"
    )
    shown = left.imshow(head.masked_fill(~head_mask, math.nan).numpy(), cmap="viridis", aspect="auto", origin="lower")
    for layer, number in (~head_mask).nonzero().tolist():
        left.text(number, layer, "x", color="firebrick", ha="center", va="center")
    left.set(xlabel="head (x: pruned)", ylabel="layer", title="attention heads: coefficient c_H")
    left.set_xticks(range(heads), range(1, heads + 1))
    bar = figure.colorbar(shown, ax=left, pad=0.02)
    bar.formatter.set_useOffset(False)

    kept = ffn_mask.float().mean(1).tolist()
    right.barh(range(layers), 1, color="lightgray")
    right.barh(range(layers), kept, color="steelblue")
    for layer, share in enumerate(kept):
        color = "white" if share > 0.3 else "black"
        right.text(0.02, layer, f"{share:.0%} of {ffn.shape[1]:,}", va="center", color=color)
    right.set(xlabel="share of the neurons kept", xlim=(0, 1), ylim=left.get_ylim(), title="FFN neurons")
    for axes in (left, right):
        axes.set_yticks(range(layers), range(1, layers + 1))
    figure.suptitle(title, parse_math=False)
    with files.atomic_write(picture) as tmp_path:
        figure.savefig(tmp_path, dpi=150, format="png")


if __name__ == "__main__":
    cli.run(main)
