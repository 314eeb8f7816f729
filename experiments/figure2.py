"""Figure 2: Clean% and Aua% of ORTicket and of a random ticket against the pruning ratio of heads and of neurons.

One ratio varies, the other stays at the task's. Writes figure2.md and one PNG per task.
"""

import collections
from fractions import Fraction
from pathlib import Path

import numpy as np
from scipy import stats

import attack
from experiments.runs import overrides_text
from experiments.tables import described, grouped, make_table
from runtime import cli
from runtime.cli import BadInput
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


def fit_ratios(runs):
    """{(start, least cosine, method, ratio): {"tickets", "seeds", "means" {value: [Aua%]}, "first", "last"}}.

    A parabola with a constant for each seed is fitted to the Aua% of the tickets of which only this ratio varies.
    "first", "last": its slopes at the smallest and at the largest value, in points per 0.1 of the ratio, with half of
    their 95 % intervals (Student's t). Fewer than 3 values, or too few tickets for 2 degrees of freedom, are left out.
    Raises BadInput for runs that cannot be compared.
    """
    points, kinds, fits = {}, {}, {}
    for run in runs:
        draw, aua = run["overrides"].get("draw", {}), run["figures"].get("textfooler Aua%")
        if run["task"] != "sst2" or len(draw) != 1 or aua is None:  # no ratio or several; no attack
            continue
        ((ratio, value),) = draw.items()
        key = Path(run["settings"]["model"]).name, least_cosine(run), run["method"], ratio
        kind = run["settings"], run["resources"], run["overrides"] | {"draw": None}
        if kinds.setdefault(key, kind) != kind:
            raise BadInput(f"runs of {key[2]} from {key[0]} in figure2.json differ: keep one kind of runs in --results")
        points.setdefault(key, []).append((float(Fraction(value)), value, run["seed"], aua))
    for key, found in sorted(points.items()):
        x, _, seeds, aua = (np.array(column) for column in zip(*sorted(found)))
        columns = [(10 * x) ** 2, 10 * x, *(seeds == seed for seed in set(seeds))]
        freedom = len(x) - len(columns)
        if len(set(x)) < 3 or freedom < 2:
            continue
        design, aua = np.stack(columns, 1).astype(float), aua - aua[0]  # equal figures then leave no rounding errors
        fitted, *_ = np.linalg.lstsq(design, aua, rcond=None)
        variance = ((aua - design @ fitted) ** 2).sum() / freedom * np.linalg.inv(design.T @ design)
        fits[key] = {"tickets": len(x), "seeds": len(set(seeds)), "means": {}}
        for _, value, _, of_ticket in sorted(found):
            fits[key]["means"].setdefault(value, []).append(of_ticket)
        for name, at in (("first", x[0]), ("last", x[-1])):
            slope = np.array([20 * at, 1, *[0] * (len(columns) - 2)])  # the derivative of the columns
            interval = stats.t.ppf(0.975, freedom) * (slope @ variance @ slope) ** 0.5
            fits[key][name] = {"difference": slope @ fitted, "interval": interval}
    return fits


def least_cosine(run):
    return float(run["overrides"].get("attack", {}).get("min_cosine", attack.Options.min_cosine))


if __name__ == "__main__":
    cli.run(main)
