"""A start for which the paper's premise holds: the model, trained further on masked language modelling.

    python -m experiments.mlm
    python -m experiments.table1 --model runs/minilm-mlm ...

MiniLM was published as a sentence encoder, without an MLM head. This command trains all of it on the bundled text
(IMDb, Rotten Tomatoes, BBC News) by `search.py` without an adversary and without a penalty, which is ordinary MLM
training. It writes the model to OUTPUT/MODEL-mlm, and its loss on held-out text, before and after, to RESULTS/mlm.json.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import data
from bert import Bert
from checkpoints.provenance import write_result
from experiments.runs import run_script
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


def main():
    options = cli.parse(Options, __doc__)
    output = files.output_folder(options.output, options.model)
    text, adapted = write_text(output / "mlm"), output.with_name(f"{output.name}-mlm")
    training = {"epochs": options.epochs, "batch_size": options.batch_size, "learning_rate": options.learning_rate}
    ordinary = {"adv_steps": 1, "adv_init_mag": 0, "lambda_head": 0, "lambda_ffn": 0, "learning_rate_c": 0}
    ordinary |= {"patience": 10**9}  # c stays 1, so that the masks never change
    where = {"model": options.model, "output": output / "mlm", "corpus": text / "train", "save_model": adapted}
    run_script("search", **where, **training, **ordinary, seed=options.seed)
    result = {"settings": training | {"model": options.model, "seed": options.seed}}
    for name, model in (("before", options.model), ("after", str(adapted))):
        result[f"loss_{name}"] = held_out_loss(model, text / "held-out", options.output)
    write_result(Path(options.results) / "mlm.json", result)
    print(f"MLM loss on held-out text: {result['loss_before']:.3f} before, {result['loss_after']:.3f} after; {adapted}")


def write_text(folder):
    """Write the bundled texts, one a line, to FOLDER/train and FOLDER/held-out."""
    texts = [
        texts[0] for rows in (data.reviews("imdb"), data.reviews("rotten_tomatoes"), data.bbc()) for texts, _ in rows
    ]
    lines = [" ".join(text.split()) for text in texts]
    for name, part in (("held-out", lines[::HELD_OUT]), ("train", [x for i, x in enumerate(lines) if i % HELD_OUT])):
        files.write_text(folder / name / "text.txt", "\n".join(part))
    return folder


def held_out_loss(name, folder, output):
    """The mean MLM loss of a model on the text in `folder`, in float32, with the same masks for every model."""
    path, sha256 = data.find_model(name)
    tokenizer, device = Tokenizer(path), pick_device()
    model = Bert.load(path, mlm=True).to(device).eval()
    if "mlm_head" in model.initialized:
        find_mlm_head(name, output, model, sha256, tokenizer, device)
    blocks, total, count = Blocks(tokenizer, *data.find_corpus(str(folder)), 128, device), 0.0, 0
    optim.seed_step(0, len(blocks))
    for chosen in torch.arange(len(blocks)).split(32):
        ids, positions, labels = blocks.batch(chosen)
        with torch.inference_mode():
            total += model.mlm_loss(model(ids, positions=positions), labels).item() * len(labels)
        count += len(labels)
    return total / count


if __name__ == "__main__":
    cli.run(main)
