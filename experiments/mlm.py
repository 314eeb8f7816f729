"""A starting point for which the paper's premise holds: the model, trained further on masked language modelling.

    python -m experiments.mlm --epochs 2
    python -m experiments.table1 --model runs/minilm-mlm2 ...

MiniLM was published as a sentence encoder, without an MLM head. This command trains the whole model on the bundled
text (IMDb, Rotten Tomatoes, BBC News) with `search.py` without adversary and penalty, which is ordinary MLM training.
It writes the model to OUTPUT/MODEL-mlm, with the number of epochs if there are several, and its loss on held-out text
before and after training to RESULTS, in a file of the same name.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import data
from bert import Bert
from checkpoints.provenance import write_result
from experiments.runs import WITHOUT_ADVERSARY, run_script
from inputs.batches import Blocks
from inputs.mlm_head import find_mlm_head
from inputs.tokenizer import Tokenizer
from runtime import cli, files, optim
from runtime.cli import option
from runtime.device import DEFAULT_MODEL, MODEL_HELP, pick_device

HELD_OUT = 50  # every 50th text


@dataclass
class Options:
    model: str = option(DEFAULT_MODEL, MODEL_HELP)
    epochs: int = option(1, "passes over the text", at_least=1)
    batch_size: int = option(16, "blocks of 128 tokens per step", at_least=1)
    learning_rate: float = option(4e-4, "peak learning rate", above=0)
    seed: int = option(0, "random seed", at_least=0)
    output: str = option("runs", "folder for the model")
    results: str = option("experiments/results", "folder for the losses")
    overwrite: bool = option(False, "train again, and replace existing files")


def main():
    options = cli.parse(Options, __doc__)
    output = files.writable(files.model_folder(options.output, options.model))
    adapted = output.with_name(f"{output.name}-mlm{options.epochs if options.epochs > 1 else ''}")
    text = output / adapted.name
    write_text(text)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "results", "overwrite")}
    # no adversary, no penalty; c stays 1, so the masks never change, which must not stop the search
    ordinary = WITHOUT_ADVERSARY | {"lambda_head": 0, "lambda_ffn": 0, "learning_rate_c": 0, "patience": 10**9}
    where = {"output": text, "corpus": text / "train", "save_model": adapted, "overwrite": options.overwrite}
    run_script("search", **settings, **ordinary, **where)
    # before: with the MLM head that the search starts with
    (before, of_before), (after, of_after) = (held_out_loss(of, text) for of in (options.model, str(adapted)))
    result = {"settings": settings, "loss_before": before, "loss_after": after, "model_sha256": [of_before, of_after]}
    write_result(Path(options.results) / f"{adapted.name}.json", result)
    print(f"MLM loss on held-out text: {before:.3f} before, {after:.3f} after; {adapted}")


def write_text(folder):
    """Write the bundled texts, one per line, to FOLDER/train and FOLDER/held-out."""
    rows = [*data.reviews("imdb"), *data.reviews("rotten_tomatoes"), *data.bbc()]
    lines = [" ".join(text.split()) for (text, *_), _ in rows]
    files.write_text(folder / "held-out" / "text.txt", "\n".join(lines[::HELD_OUT]))
    del lines[::HELD_OUT]
    files.write_text(folder / "train" / "text.txt", "\n".join(lines))


def held_out_loss(name, folder):
    """(mean MLM loss of a model on FOLDER/held-out, in float32, with the same masks for every model; the model's
    sha256)."""
    path, sha256 = data.find_model(name)
    tokenizer, device = Tokenizer(path), pick_device()
    model = Bert.load(path, mlm=True).to(device).eval()
    if "mlm_head" in model.initialized:
        find_mlm_head(name, folder, model, sha256, tokenizer, device)
    blocks, losses = Blocks(tokenizer, *data.find_corpus(str(folder / "held-out")), 128, device), []
    optim.seed_step(0, len(blocks))
    for chosen in torch.arange(len(blocks)).split(32):
        ids, positions, labels = blocks.batch(chosen)
        with torch.inference_mode():
            losses.append(model.mlm_loss(model(ids, positions=positions), labels).expand(len(labels)))
    return torch.cat(losses).mean().item(), sha256


if __name__ == "__main__":
    cli.run(main)
