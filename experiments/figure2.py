"""Figure 2: Clean% and Aua% of ORTicket and of a random ticket against the pruning ratio of heads and of neurons.

One ratio varies, the other stays at the task's. Writes figure2.md and one PNG per task.
"""

import collections
from fractions import Fraction
from pathlib import Path

import numpy as np

from experiments.runs import overrides_text
from experiments.tables import described, grouped, make_table
from runtime import cli
from sharing.plots import new_figure, save_figure

RATIOS = {"tau_head": ("1/12", "1/6", "1/4", "1/3"), "tau_ffn": ("0.05", "0.1", "0.2", "0.3", "0.4")}
PRUNED = {"tau_head": "heads", "tau_ffn": "neurons"}


def main():
    draws = [{ratio: value} for ratio, values in RATIOS.items() for value in values]
    defaults = {"tasks": ("sst2", "qnli", "agnews"), "attacks": ("textfooler",)}
    options, runs = make_table("figure2", __doc__, ("ORTicket", "Random ticket"), draws=draws, **defaults)
    numbers = collections.Counter()  # of plots per task: one for all runs with the same settings
    for group in grouped(runs):
        task = group[0]["task"]
        numbers[task] += 1
        path = Path(options.results) / f"figure2-{task}{f'-{numbers[task]}' * (numbers[task] > 1)}.png"
        plot(group, path)
        print(f"{path}: {described(group)}")


def plot(runs, path):
    """Four panels: Clean% above Aua%, for each ratio. Small dots are runs, lines their means."""
    settings, points = runs[0]["settings"], {}
    others = [overrides_text({name: of for name, of in run["overrides"].items() if name != "draw"}) for run in runs]
    kinds = {(run["method"], other) for run, other in zip(runs, others)}
    are_several = len(kinds) > len({method for method, _ in kinds})  # rows of one method
    for run, other in zip(runs, others):
        draw = run["overrides"].get("draw", {})
        for column in ("Clean%", *(f"{name} Aua%" for name in settings["attacks"].split())):
            for ratio in draw if len(draw) == 1 else ():
                line = points.setdefault((ratio, f"{run['method']}, {column}{other * are_several}"), {})
                line.setdefault(float(Fraction(draw[ratio])), []).append(run["figures"][column])
    figure, axes = new_figure(2, 2, figsize=(9, 5), sharex="col", sharey="row", layout="constrained")
    for (ratio, label), line in points.items():
        x, numbers = zip(*sorted(line.items()))
        ax = axes[int("Clean%" not in label), list(RATIOS).index(ratio)]
        (drawn,) = ax.plot(x, [np.mean(of) for of in numbers], marker="o", label=label)
        ax.plot(*zip(*((at, one) for at, of in zip(x, numbers) for one in of)), ".", color=drawn.get_color(), alpha=0.5)
        axes[1, list(RATIOS).index(ratio)].set_xlabel(f"pruning ratio of the {PRUNED[ratio]}")
    for ax, label in zip(axes[:, 0], ("Clean%", "Aua%")):
        ax.set_ylabel(label)
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=7)
    shared = "" if are_several else max(others, key=len).replace("`", "")  # a random ticket has no --search
    figure.suptitle(f"{settings['model']} on {runs[0]['task']}{shared}", fontsize=9, parse_math=False)
    save_figure(figure, path)


if __name__ == "__main__":
    cli.run(main)
