"""Figure 1: the share of searches whose ticket keeps a head, or the neurons of a layer. Models stand side by side.

    python -m experiments.figure1 --models bert-base-uncased roberta-base

The options of the search are those of table1.py. Writes figure1.png and figure1.json to --results.
"""

from dataclasses import dataclass
from pathlib import Path

from checkpoints.tickets import read_coefficients
from experiments import tables
from experiments.runs import DEFAULTS, parse_overrides, run_search
from gates import draw_masks
from runtime import cli, files
from runtime.cli import option
from sharing.plots import plot_survival, survival_shares


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
    plot_survival(shares, options.searches, path)
    print(f"the mean of {options.searches} searches: {path}")


def survival(options, model):
    """{"heads": (layers, heads), "neurons": (layers, 1)}: the share of the searches that keep each."""
    kept, search = [], DEFAULTS["search"] | parse_overrides(options)["search"]
    for seed in range(options.searches):
        head, ffn, _ = read_coefficients(run_search(options, model, search | {"seed": seed})[0])
        kept.append(draw_masks(head, ffn, options.tau_head, options.tau_ffn))
    return survival_shares(kept)


if __name__ == "__main__":
    cli.run(main)
