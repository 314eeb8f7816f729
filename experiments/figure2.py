"""Figure 2: Clean% and Aua% of ORTicket and of a random ticket against the pruning ratio of heads and of neurons.

    python -m experiments.figure2 --tasks sst2 --seeds 3

The options are those of table1.py. One ratio varies, the other stays at the task's. Writes figure2.png and figure2.md.
"""

from pathlib import Path

from experiments.compare import mean_and_interval
from experiments.runs import METHODS
from experiments.tables import described, grouped, make_runs, markdown, parse, write_markdown
from runtime import cli
from sharing.plots import new_figure, save_figure

RATIOS = {"tau_head": ("1/12", "1/6", "1/4", "1/3"), "tau_ffn": ("0.05", "0.1", "0.2", "0.3", "0.4")}
ROWS = ("ORTicket", "Random ticket")


def main():
    options = parse(__doc__, ROWS, tasks=("sst2", "qnli", "agnews"), attacks=("textfooler",))
    cells = [
        (task, method, seed, {"draw": {ratio: value}})
        for task in options.tasks
        for seed in range(options.seeds)
        for ratio, values in RATIOS.items()
        for value in values
        for method in options.methods
    ]
    runs = make_runs(options, "figure2", cells)
    if not options.dry_run:
        write_markdown(options, "figure2", markdown("figure2", runs))
        for (task, settings, _), group in grouped(runs):
            path = Path(options.results) / f"figure2-{task}.png"
            plot(task, settings, group, path)
            print(f"{path}: {described(settings, group)}")


def plot(task, settings, runs, path):
    """Two panels, one for each ratio. The bars are 95 % intervals over the seeds."""
    columns = ["Clean%", *(f"{attack} Aua%" for attack in settings["attacks"].split())]
    figure, axes = new_figure(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for ax, ratio in zip(axes, RATIOS):
        for method in [name for name in METHODS if any(run["method"] == name for run in runs)]:
            for column in columns:
                points = {}
                for run in runs:
                    value = run["overrides"].get("draw", {}).get(ratio)
                    if run["method"] == method and value is not None and len(run["overrides"]["draw"]) == 1:
                        points.setdefault(fraction(value), []).append(run["figures"][column])
                x = sorted(points)
                mean, interval = zip(*(mean_and_interval(points[value]) for value in x)) if x else ((), ())
                ax.errorbar(x, mean, interval, marker="o", capsize=3, label=f"{method}, {column}")
        ax.set(xlabel=f"pruning ratio of the {'heads' if ratio == 'tau_head' else 'neurons'}", ylim=(0, 100))
    axes[0].set_ylabel("%")
    axes[1].legend(fontsize=7)
    figure.suptitle(f"{settings['model']} on {task}", parse_math=False)
    save_figure(figure, path)


def fraction(text):
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


if __name__ == "__main__":
    cli.run(main)
