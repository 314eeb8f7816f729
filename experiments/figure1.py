"""Figure 1: the share of searches whose ticket keeps a head, or the neurons of a layer. Models are shown side by side.

    python -m experiments.figure1 --models bert-base-uncased roberta-base

The options are those of table1.py; --draw takes only tau-head and tau-ffn. Writes figure1.png and figure1.json to
--results.
"""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import draw
from checkpoints.provenance import write_result
from checkpoints.tickets import read_coefficients
from experiments import tables
from experiments.runs import DEFAULTS, parse_overrides, run_search
from gates import draw_masks
from runtime import cli
from runtime.cli import BadInput, option
from sharing.plots import plot_survival, survival_shares


@dataclass
class Options(tables.Options):
    models: tuple = option((), "several models, instead of --model")
    searches: int = option(None, "searches per model, with the seeds from 0 [10; 3 with --quick]", at_least=1)


def main():
    options = tables.parse(__doc__, Options)
    options.searches = options.searches or (3 if options.quick else 10)
    models = options.models or (options.model,)
    overrides = parse_overrides(options)
    ratios = {"tau_head": "1/6", "tau_ffn": "0.3"} | overrides["draw"]
    if len(ratios) > 2:
        raise BadInput(f"--draw {' '.join(options.draw)}: this figure takes only tau-head and tau-ffn of draw.py")
    settings = {"searches": options.searches, "search": DEFAULTS["search"] | overrides["search"]} | ratios
    taus = [parse_ratio(name, ratios[name]) for name in ("tau_head", "tau_ffn")]
    if options.dry_run:
        return print(f"{options.searches} searches each of {', '.join(models)}, except those in {options.output}")
    shares = {model: survival(options, model, settings, taus) for model in models}
    path = Path(options.results) / "figure1.png"
    as_lists = {model: {name: share.tolist() for name, share in of.items()} for model, of in shares.items()}
    write_result(path.with_suffix(".json"), {"settings": settings, "shares": as_lists})
    plot_survival(shares, options.searches, path)
    print(f"the mean of {options.searches} searches: {path}")


def parse_ratio(name, text):
    """The number of an option of draw.py. Raises BadInput for one that draw.py refuses."""
    field = next(field for field in fields(draw.Options) if field.name == name)
    try:
        return cli.parse_bounded(field, text)
    except argparse.ArgumentTypeError as error:
        raise BadInput(f"--draw {name.replace('_', '-')}={text}: {error}") from None


def survival(options, model, settings, taus):
    """{"heads": (layers, heads), "neurons": (layers, 1)}: the share of the searches that keep each."""
    kept = []
    for seed in range(settings["searches"]):
        head, ffn, _ = read_coefficients(run_search(options, model, settings["search"] | {"seed": seed})[0])
        kept.append(draw_masks(head, ffn, *taus))
    return survival_shares(kept)


if __name__ == "__main__":
    cli.run(main)
