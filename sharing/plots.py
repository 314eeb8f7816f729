"""The figures that search.py, draw.py and sharing.publish write beside their results, and Figure 1."""

import math

import numpy as np
import torch

from gates import EarlyStopping
from runtime.files import atomic_write


def save_figure(figure, path):
    """Write the figure to `path` as a PNG."""
    with atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, dpi=150, format="png")


def new_figure(*grid, figsize, layout=None, **settings):
    """(figure, its axes) of matplotlib. Imported here: it takes a second, which --help need not wait for."""
    from matplotlib.figure import Figure

    figure = Figure(figsize, layout=layout)
    return figure, figure.subplots(*grid, **settings)


def random_walk_distances(trace, tau_head, tau_ffn, walks=20):
    """The distances (mini-epochs, 2) that masks would have if c moved at random, the mean of `walks` random walks.

    The steps are those of c_H and c_F in `trace`, less their mean, each with a random sign. As in `EarlyStopping`, the
    first distances are NaN. A search that finds something settles earlier than this.
    """
    generator, total = torch.Generator().manual_seed(0), torch.zeros(len(trace["trace.head"]), 2)
    traces = [trace[name] for name in ("trace.head", "trace.ffn")]
    steps = [c.diff(dim=0, prepend=torch.ones_like(c[:1])) for c in traces]  # c starts at 1
    for _ in range(walks):
        places = [torch.ones_like(c[0]) for c in traces]
        stopping = EarlyStopping(tau_head, tau_ffn, gamma=0, patience=1)  # only measures the distances
        for number, pair in enumerate(zip(*steps)):
            signs = [torch.randint(2, step.shape, generator=generator) * 2 - 1 for step in pair]
            places = [c + sign * (step - step.mean()) for c, sign, step in zip(places, signs, pair)]
            total[number] += torch.tensor(stopping.update(*places))
    return total / walks


def plot_search(trace, settings, path):
    """The distances of every mini-epoch with the threshold gamma and those of random walks, and the loss.
    settings: those of search.py. trace: {"trace.distances": (mini-epochs, 2), "trace.loss": (mini-epochs,),
    "trace.head": (mini-epochs, layers, heads), "trace.ffn": (mini-epochs, layers, neurons)}."""
    distances = trace["trace.distances"].numpy()
    x = range(1, len(distances) + 1)
    figure, (above, below) = new_figure(2, 1, figsize=(7, 5.2), sharex=True, height_ratios=(3, 1.3))
    above.plot(x, distances[:, 0], marker="o", label=f"heads, tau = {settings['tau_head']:.3g}")
    above.plot(x, distances[:, 1], marker="s", label=f"neurons, tau = {settings['tau_ffn']:.3g}")
    chance = random_walk_distances(trace, settings["tau_head"], settings["tau_ffn"])
    above.plot(x, chance[:, 0], color="gray", marker="o", markersize=3, label="heads, if c moved at random")
    above.plot(x, chance[:, 1], color="gray", marker="s", markersize=3, label="neurons, if c moved at random")
    above.axhline(settings["gamma"], color="black", linestyle="--", linewidth=1, label=f"gamma = {settings['gamma']:g}")
    above.set(ylabel="normalized Hamming distance", ylim=(0, None))
    data = settings["corpus"] if settings["objective"] == "mlm" else settings["objective"]
    title = f"Distance between the masks of consecutive mini-epochs: {settings['model']} on {data}"
    above.set_title(title, fontsize=10, parse_math=False)
    above.legend()
    below.plot(x, trace["trace.loss"].numpy(), color="gray", marker=".")
    below.set(xlabel=f"mini-epoch ({settings['mini_epoch']:g} epoch each)", ylabel="loss")
    below.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    save_figure(figure, path)


def plot_ticket(head, ffn, head_mask, ffn_mask, title, path):
    """What a ticket keeps of each layer, as in Figure 1: each head with its coefficient, and the share of neurons.
    head, head_mask: (layers, heads). ffn, ffn_mask: (layers, neurons)."""
    layers, heads = head.shape
    size = 10, 1.6 + 0.36 * layers
    figure, (left, right) = new_figure(1, 2, figsize=size, width_ratios=(heads, 8), layout="constrained")
    image = left.imshow(head.masked_fill(~head_mask, math.nan).numpy(), cmap="viridis", aspect="auto", origin="lower")
    for layer, number in (~head_mask).nonzero().tolist():
        left.text(number, layer, "x", color="firebrick", ha="center", va="center")
    left.set(xlabel="head (x: pruned)", ylabel="layer", title="attention heads: coefficient c_H")
    left.set_xticks(range(heads), range(1, heads + 1))
    figure.colorbar(image, ax=left, pad=0.02).formatter.set_useOffset(False)

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
    save_figure(figure, path)


def survival_shares(tickets):
    """{"heads": (layers, heads), "neurons": (layers, 1)}: the share of the tickets, pairs of masks, that keep each."""
    heads, neurons = (torch.stack(masks).float().mean(0) for masks in zip(*tickets))
    return {"heads": heads, "neurons": neurons.mean(1, keepdim=True)}


def plot_survival(shares, searches, path):
    """A pair of heat maps for each model, as in Figure 1: heads, and neurons by layer.
    shares: {model: `survival_shares` of the tickets of its searches}. searches: their number."""
    maps = [(model, name, share) for model, of in shares.items() for name, share in of.items()]
    widths = [max(2, share.shape[1]) for *_, share in maps]
    size = 1 + 0.45 * sum(widths), 1.5 + 0.36 * max(len(share) for *_, share in maps)
    figure, axes = new_figure(1, len(maps), figsize=size, width_ratios=widths, layout="constrained")
    for ax, (model, name, share) in zip(axes, maps):
        image = ax.imshow(share.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
        ax.set_title(f"{model}, {name}" if name == "heads" else name, fontsize=9, parse_math=False)
        ax.set(xlabel="head" if name == "heads" else "all neurons", ylabel="layer")
        ax.set_yticks(range(len(share)), range(1, len(share) + 1))
        heads = share.shape[1] if name == "heads" else 0
        ax.set_xticks(range(heads), range(1, heads + 1))
        for (layer, column), value in np.ndenumerate(share.numpy()):
            color = "white" if value < 0.6 else "black"
            ax.text(column, layer, f"{value:.0%}", ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, ax=axes, pad=0.01, label=f"share kept, mean of {searches} searches")
    save_figure(figure, path)
