"""Figure 1: the share of searches whose ticket keeps a head, or the neurons of a layer. Models stand side by side.

    python -m experiments.figure1 --models bert-base-uncased roberta-base
    python -m experiments.figure1 --models minilm --corpus bbc --searches 3

Writes figure1.png and figure1.json to --results.
"""

from dataclasses import dataclass
from pathlib import Path

from checkpoints.tickets import read_coefficients
from experiments.runs import DEFAULTS, folder_name, run_script
from gates import draw_masks
from runtime import cli, files
from runtime.cli import option
from runtime.device import DEFAULT_MODEL, MODEL_HELP
from sharing.plots import plot_survival, survival_shares


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
    plot_survival(shares, options.searches, path)
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
    return survival_shares(kept)


if __name__ == "__main__":
    cli.run(main)
