"""The MLM head of a model that was published without one, such as MiniLM: fitted with the encoder frozen.

It is no part of Algorithm 1. search.py needs the head for its loss, BERT-Attack for its substitutes.
"""

import contextlib
from dataclasses import asdict

import filelock
import torch

import data
from checkpoints import safetensors
from checkpoints.provenance import load_module, read_made_by, software
from inputs.batches import Blocks, mask_tokens
from runtime import cli, files, optim
from runtime.cli import BadInput
from runtime.device import autocast, pick_precision, precision_name

# what the fitted head depends on, with the defaults of search.py
SETTINGS = {"seed": 0, "block": 128, "batch_size": 32, "warmup": 0.1, "precision": "auto"}
SETTINGS |= {"mlm_head_steps": 200, "mlm_head_learning_rate": 3e-3}


def fit_mlm_head(name, provenance, model, tokenizer, blocks, path, dtype):
    """Fit the MLM head of `model` on the corpus `blocks`, and write it to `path`. Reuse `path` if it is up to date.

    name: of the model, for the message. provenance: its "settings" hold at least `SETTINGS`.
    """
    settings = {key: provenance["settings"][key] for key in SETTINGS}
    provenance = provenance | {"script": "mlm_head.py", "settings": settings, **software(__file__)}
    try:
        if path.is_file():
            return load_module(model.mlm_head, read_made_by(path, provenance)[0], path)
    except BadInput as error:
        print(f"{error}: fitting another")
    print(f"{name} has no MLM head: fitting one with the encoder frozen, saved to {path}")
    train_mlm_head(model, tokenizer, blocks, dtype, settings)
    safetensors.write_safetensors(path, model.mlm_head.state_dict(), provenance)


def train_mlm_head(model, tokenizer, blocks, dtype=torch.float32, settings=SETTINGS):
    """Train the MLM head of `model` on the corpus `blocks`, and nothing else of it. The bias starts at the log
    frequencies of the corpus's tokens, so that the head need not learn them."""
    head, device = model.mlm_head, model.mlm_head.bias.device
    counts = blocks.frequencies(model.config.vocab_size) + 0.5
    head.bias.data.copy_((counts / counts.sum()).log())
    steps, rate = settings["mlm_head_steps"], settings["mlm_head_learning_rate"]
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0, fused=True)
    bar = cli.progress(steps, description="MLM head")
    for step in range(steps):
        optim.seed_step(settings["seed"], 3, step)
        rows = torch.randint(len(blocks), (min(settings["batch_size"], len(blocks)),))
        ids, positions, labels = (t.to(device) for t in mask_tokens(blocks.rows(rows), tokenizer))
        with autocast(device, dtype):
            with torch.no_grad():
                states = model.eval()(ids, positions=positions)
            loss = model.mlm_loss(states, labels)
        loss.backward(inputs=list(head.parameters()))
        optim.set_learning_rate(optimizer, rate, step, steps, settings["warmup"])
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        bar.set_postfix_str(lambda: f"loss {loss:.3f}", refresh=False)
    bar.close()


def find_mlm_head(name, output, model, model_sha256, tokenizer, device):
    """Give `model`, loaded as `name`, the head that search.py saved in OUTPUT/MODEL, or fit one with its defaults.

    Returns the metadata of the head.
    """
    path = files.output_folder(output, name) / "mlm_head.safetensors"
    with filelock.FileLock(f"{path}.lock"):  # one of several processes fits, the others wait
        found = {}
        if path.is_file():
            with contextlib.suppress(BadInput):  # `fit_mlm_head` says what is wrong, and fits another
                found = safetensors.read_with_metadata(path)[1]
        if found.get("model_sha256") != model_sha256:
            blocks = Blocks(tokenizer, *data.find_corpus("bbc"), SETTINGS["block"])
            dtype = pick_precision(device, SETTINGS["precision"])
            provenance = {
                "settings": SETTINGS | {"precision": precision_name(dtype)},
                "model_sha256": model_sha256,
                "config": asdict(tokenizer.config),
                "corpus_sha256": blocks.sha256,
            }
            torch.manual_seed(SETTINGS["seed"])
            model.mlm_head.apply(model.initialize)
            fit_mlm_head(name, provenance, model.to(device), tokenizer, blocks, path, dtype)
    tensors, metadata = safetensors.read_with_metadata(path)
    load_module(model.mlm_head, tensors, path)
    return metadata
