"""The MLM head of a model that was published without one, such as MiniLM: fitted with the encoder frozen.

This is not part of Algorithm 1. search.py needs the head for its loss, BERT-Attack for its substitutes. A head for
MiniLM, fitted on BBC News with the defaults below, is published with this project.
"""

import contextlib
from dataclasses import asdict
from pathlib import Path

import filelock
import torch

import data
from checkpoints import safetensors
from checkpoints.provenance import load_module, read_made_by, software
from inputs.batches import Blocks, mask_tokens
from runtime import cli, files, optim
from runtime.cli import BadInput
from runtime.device import autocast, pick_precision, precision_name

FITTING = {"mlm_head_steps": 200, "mlm_head_learning_rate": 3e-3}  # the defaults of search.py
# what the fitted head depends on, with the values of the published one
SETTINGS = FITTING | {"seed": 0, "block": 128, "batch_size": 32, "warmup": 0.1, "precision": "auto"}


def choose_mlm_head(options, model_sha256):
    """{"mlm_head_sha256": that of the published head} if a search with these options uses it; {} otherwise. Sets the
    fitting options that are not given to their defaults."""
    given = [getattr(options, name) for name in FITTING]
    options.mlm_head_steps, options.mlm_head_learning_rate = (a or b for a, b in zip(given, FITTING.values()))
    if any(given) or options.objective != "mlm" or options.corpus not in ("bbc", "bbc-small"):
        return {}
    path = published_path(model_sha256)
    return {"mlm_head_sha256": files.sha256(path)} if path else {}


def published_path(model_sha256):
    """Path of the published head of the bundled model with this sha256, None if there is none."""
    paths = [data.PUBLISHED / f"{name}-mlm-head.safetensors" for name, of in data.BUNDLED.items() if model_sha256 in of]
    return next(filter(Path.is_file, paths), None)


def load_published(name, model, model_sha256):
    """Load the published head into `model`, which has the name `name`. Returns the metadata of the head.

    Raises BadInput if the file is damaged, or was fitted to another model or with other settings. An earlier version
    of the code made it, so its "code" is not compared.
    """
    path = published_path(model_sha256)
    tensors, metadata = safetensors.read_with_metadata(path, "mlm_head.py")
    if metadata.get("model_sha256") != model_sha256 or metadata["settings"] | {"precision": "auto"} != SETTINGS:
        raise BadInput(f"{path} was fitted to another model or with other settings: restore it, or remove it")
    load_module(model.mlm_head, tensors, path)
    how = f"fitted on BBC News in {metadata['settings']['mlm_head_steps']} steps"
    print(f"MLM head of {name}: the published one, {how}; search.py --mlm-head-steps N fits another")
    return metadata


def fit_mlm_head(name, provenance, model, tokenizer, blocks, path, dtype):
    """Fit the MLM head of `model` on the corpus `blocks`, and write it to `path`. Reuse `path` if it is up to date.

    name: of the model, for the message. provenance: its "settings" must have the keys of `SETTINGS`.
    """
    if "mlm_head_sha256" in provenance:
        return load_published(name, model, provenance["model_sha256"])
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
    """Train only the MLM head of `model`, on the corpus `blocks`. The bias starts at the log frequencies of the tokens,
    so the head need not learn them."""
    head, device = model.mlm_head, model.mlm_head.bias.device
    counts = blocks.frequencies(model.config.vocab_size) + 0.5
    head.bias.data.copy_((counts / counts.sum()).log())
    steps, rate = settings["mlm_head_steps"], settings["mlm_head_learning_rate"]
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0, fused=True)
    with cli.progress(steps, description="MLM head") as bar:
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


def find_mlm_head(name, output, model, model_sha256, tokenizer, device):
    """Load a head into `model`, which has the name `name`: the one that search.py saved in OUTPUT/MODEL, or else the
    published one, or else one fitted on BBC News.

    Returns the metadata of the head.
    """
    path = files.writable(files.model_folder(output, name)) / "mlm_head.safetensors"
    with filelock.FileLock(f"{path}.lock"):  # one of several processes fits, the others wait
        found = {}
        with contextlib.suppress(FileNotFoundError, BadInput):  # `fit_mlm_head` says what is wrong, and fits another
            found = safetensors.read_with_metadata(path)[1]
        if found.get("model_sha256") != model_sha256:
            if published_path(model_sha256):
                return load_published(name, model, model_sha256)
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
