"""Figure 1: the share of searches whose ticket keeps a head, or the neurons of a layer. Models stand side by side.

    python -m experiments.figure1 --models bert-base-uncased roberta-base

The options of the search are those of table1.py. Writes figure1.png and figure1.json to --results.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from checkpoints.tickets import read_coefficients
from experiments import tables
from experiments.runs import DEFAULTS, parse_overrides, run_search
from gates import draw_masks
from runtime import cli, files
from runtime.cli import option
from sharing.plots import new_figure, save_figure


@dataclass
class Options(tables.Options):
    models: tuple = option((), "several models, instead of --model")
    searches: int = option(None, "searches per model, with the seeds from 0 [10; 3 with --quick]", at_least=1)
    tau_head: float = option(1 / 6, "pruning ratio of the heads", at_least=0, below=1)
    tau_ffn: float = option(0.3, "pruning ratio of the neurons", at_least=0, below=1)


def main():
    options = tables.parse(__doc__, Options)
    options.searches = options.searches or (3 if options.quick else 10)
    models = options.models or (options.model,)
    if options.dry_run:
        return print(f"{options.searches} searches each of {', '.join(models)}, less those in {options.output}")
    shares = {model: survival(options, model) for model in models}
    path = Path(options.results) / "figure1.png"
    as_lists = {model: {name: share.tolist() for name, share in of.items()} for model, of in shares.items()}
    files.write_json(path.with_suffix(".json"), as_lists)
    plot(shares, options.searches, path)
    print(f"the mean of {options.searches} searches: {path}")


def survival(options, model):
    """{"heads": (layers, heads), "neurons": (layers, 1)}: the share of the searches that keep each."""
    kept, search = [], DEFAULTS["search"] | parse_overrides(options)["search"]
    for seed in range(options.searches):
        head, ffn, _ = read_coefficients(run_search(options, model, search | {"seed": seed})[0])
        kept.append(draw_masks(head, ffn, options.tau_head, options.tau_ffn))
    heads, neurons = (torch.stack(masks).float().mean(0) for masks in zip(*kept))
    return {"heads": heads, "neurons": neurons.mean(1, keepdim=True)}


def plot(shares, searches, path):
    """A pair of heat maps for each model: heads, and neurons by layer."""
    maps = [(model, name, share) for model, of in shares.items() for name, share in of.items()]
    widths = [max(2, share.shape[1]) for *_, share in maps]
    size = 1 + 0.45 * sum(widths), 1.5 + 0.36 * max(len(share) for *_, share in maps)
    figure, axes = new_figure(1, len(maps), figsize=size, width_ratios=widths, layout="constrained")
    for ax, (model, name, share) in zip(axes, maps):
        image = ax.imshow(share.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
        ax.set_title(f"{model}, {name}" if name == "heads" else name, fontsize=9, parse_math=False)
        ax.set(xlabel="head" if name == "heads" else "all neurons", ylabel="layer")
        for set_ticks, count in zip((ax.set_yticks, ax.set_xticks), share.shape):
            set_ticks(range(count), range(1, count + 1))
        for (layer, column), value in np.ndenumerate(share.numpy()):
            color = "white" if value < 0.6 else "black"
            ax.text(column, layer, f"{value:.0%}", ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, ax=axes, pad=0.01, label=f"share kept, mean of {searches} searches")
    save_figure(figure, path)


if __name__ == "__main__":
    cli.run(main)
