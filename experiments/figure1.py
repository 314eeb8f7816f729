"""Figure 1: the share of searches whose ticket keeps a head, or the neurons of a layer. Models stand side by side.

    python -m experiments.figure1 --models bert-base-uncased roberta-base
    python -m experiments.figure1 --models minilm --corpus bbc --searches 3

Writes figure1.png and figure1.json to --results.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.tickets import read_coefficients
from experiments.runs import DEFAULTS, folder_name, run_script
from gates import draw_masks
from runtime import cli, files
from runtime.cli import option
from runtime.device import DEFAULT_MODEL, MODEL_HELP
from sharing.plots import new_figure, save_figure


@dataclass
class Options:
    models: tuple = option((DEFAULT_MODEL,), MODEL_HELP)
    corpus: str = option(DEFAULTS["search"]["corpus"], "corpus of the searches")
    searches: int = option(10, "searches per model, with the seeds from 0", at_least=1)
    tau_head: float = option(1 / 6, "pruning ratio of the heads", at_least=0, below=1)
    tau_ffn: float = option(0.3, "pruning ratio of the neurons", at_least=0, below=1)
    quick: bool = option(False, "a small version: MiniLM, BBC News, 3 searches")
    output: str = option("runs", "folder for the searches; those of the tables are used again")
    results: str = option("experiments/results", "folder for the figure")


def main():
    options = cli.parse(Options, __doc__)
    if options.quick:
        options.models, options.corpus, options.searches = ("minilm",), "bbc", 3
    shares = {model: survival(options, model) for model in options.models}
    files.write_json(
        Path(options.results) / "figure1.json",
        {model: {name: share.tolist() for name, share in of.items()} for model, of in shares.items()},
    )
    path = Path(options.results) / "figure1.png"
    plot(shares, options.searches, path)
    print(f"the mean of {options.searches} searches: {path}")


def survival(options, model):
    """{"heads": (layers, heads), "neurons": (layers,)}: the share of the searches that keep each."""
    kept = []
    for seed in range(options.searches):
        search = {"corpus": options.corpus, "seed": seed}
        output = Path(options.output, folder_name(search))
        run_script("search", model=model, output=output, **search)
        head, ffn, _ = read_coefficients(files.model_folder(output, model) / "coefficients.safetensors")
        kept.append(draw_masks(head, ffn, options.tau_head, options.tau_ffn))
    heads, neurons = (torch.stack(masks).float().mean(0) for masks in zip(*kept))
    return {"heads": heads, "neurons": neurons.mean(1)}


def plot(shares, searches, path):
    """A pair of heat maps for each model: heads, and neurons by layer."""
    widths = [width for of in shares.values() for width in (of["heads"].shape[1], 2)]
    size = 1 + 0.45 * sum(widths), 1.5 + 0.36 * max(len(of["heads"]) for of in shares.values())
    figure, axes = new_figure(1, 2 * len(shares), figsize=size, width_ratios=widths, layout="constrained")
    for number, (model, of) in enumerate(shares.items()):
        for side, name, share in ((0, "heads", of["heads"]), (1, "neurons", of["neurons"][:, None])):
            ax = axes[2 * number + side]
            image = ax.imshow(share.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
            ax.set_title(f"{model}, {name}" if side == 0 else name, fontsize=9, parse_math=False)
            ax.set_yticks(range(len(share)), range(1, len(share) + 1))
            ax.set_xticks(range(share.shape[1]), range(1, share.shape[1] + 1) if side == 0 else ["all"])
            ax.set(ylabel="layer" if side == 0 else None, xlabel="head" if side == 0 else None)
            for layer, row in enumerate(share.tolist()):
                for column, value in enumerate(row):
                    color = "white" if value < 0.6 else "black"
                    ax.text(column, layer, f"{value:.0%}", ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, ax=axes, pad=0.01, label=f"share kept, mean of {searches} searches")
    save_figure(figure, path)


if __name__ == "__main__":
    cli.run(main)
