"""Read what search.py and draw.py wrote, coefficients and tickets, and check that they fit the model."""

import shlex
from dataclasses import fields, replace
from pathlib import Path

import torch

import data
from bert import Bert, Config
from checkpoints import safetensors
from checkpoints.provenance import check_tensors, note_other_code
from gates import draw_masks
from runtime import cli, files
from runtime.cli import BadInput


def read_coefficients(path, seed=None):
    """(c_H (layers, heads), c_F (layers, neurons), metadata) of a file that search.py or `sharing.publish` wrote.

    A file of `sharing.publish` holds several searches: `seed` selects one, None the first; metadata["seeds"] lists all.
    Raises BadInput if it is some other file, if its shapes are not those of its model, or if it lacks the seed.
    """
    tensors, metadata = safetensors.read_with_metadata(path, "search.py", "publish.py")
    try:
        config, model = Config(**metadata["config"]), metadata["settings"]["model"]
        complete = isinstance(model, str) and {"model_sha256", "corpus_sha256", "versions"} <= metadata.keys()
        kinds = {field.name: (int, float) if field.type is float else field.type for field in fields(Config)}
        complete = complete and all(isinstance(getattr(config, name), kind) for name, kind in kinds.items())
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise BadInput(f"{path} does not say how it was made: search again")
    is_one = metadata["script"] == "search.py"
    seeds = [metadata["settings"].get("seed")] if is_one else metadata.get("seeds")
    if not (isinstance(seeds, list) and seeds and all(type(each) is int for each in seeds)):
        raise BadInput(f"{path} does not say its seeds: make it again")
    if seed not in (None, *seeds):
        raise BadInput(f"{path} has no search with seed {seed}: give one of {', '.join(map(str, seeds))}")
    head, ffn = heads_and_neurons(path, tensors, config, torch.float32, () if is_one else (len(seeds),))
    if not is_one:
        number = 0 if seed is None else seeds.index(seed)
        head, ffn, metadata["settings"]["seed"] = head[number], ffn[number], seeds[number]
    return head, ffn, metadata


def heads_and_neurons(path, tensors, config, dtype, searches=()):
    """The tensors head (*searches, layers, heads) and ffn (*searches, layers, neurons). Raises BadInput if they do not
    fit the model."""
    found = [tensors.get(name, torch.empty(0)) for name in ("head", "ffn")]
    for tensor, width in zip(found, (config.num_attention_heads, config.intermediate_size)):
        shape = *searches, config.num_hidden_layers, width
        if tensor.shape != shape or tensor.dtype != dtype or not torch.isfinite(tensor).all():
            raise BadInput(f"{path} has no finite {dtype} tensor of shape {shape}: make it again")
    return found


def find_ticket(options, drawn, model_sha256, config):
    """((head mask, FFN mask), sha256 of the file) of --ticket; (None, None) for the full model; for a ticket of
    robustt.py ({name: mask of a weight}, sha256). drawn: the path of draw.py's ticket.

    Raises BadInput if the ticket does not exist, is not a ticket, or belongs to another model or task.
    """
    if options.ticket_seed is not None and options.ticket != "random":
        raise BadInput(f"--ticket-seed {options.ticket_seed} is for --ticket random, not {options.ticket}")
    if options.ticket == "none":
        if options.ablation:
            raise BadInput(f"--ablation {options.ablation} needs a ticket, not --ticket none")
        return None, None
    path = drawn if options.ticket in ("drawn", "random") else Path(options.ticket)
    command = f"python draw.py --task {shlex.quote(options.task)}{cli.flags(options, 'model', 'output')}"
    if not path.is_file():
        remedy = f"run {command} first" if path == drawn else "give drawn, random, none or a file"
        raise BadInput(f"there is no ticket {path}: {remedy}")
    tensors, metadata = safetensors.read_with_metadata(path, "draw.py", "robustt.py")
    drawn_for = str(metadata["settings"].get("task", options.task))
    if (drawn_for in data.TASKS) != (options.task in data.TASKS) and path == drawn:  # imdb and a custom imdb.csv
        raise BadInput(f"{path} was drawn for {drawn_for}: run {command} again")
    if metadata.get("model_sha256") != model_sha256:
        raise BadInput(f"{path} was drawn for another model than {options.model}")
    note_other_code(path, metadata)
    if metadata["script"] == "robustt.py":
        if options.ablation:
            raise BadInput(f"--ablation {options.ablation} needs a ticket of heads and neurons, not of single weights")
        with torch.device("meta"):
            weights = {name: p.bool() for name, p in Bert(replace(config, num_labels=2)).named_parameters()}
        check_tensors(path, tensors, {name: weight for name, weight in weights.items() if name in tensors})
        return tensors, files.sha256(path)
    masks = tuple(heads_and_neurons(path, tensors, config, torch.bool))
    if not masks[0].any(1).all():
        raise BadInput(f"{path} leaves a layer without a head: run {command} again")
    if options.ticket == "random":
        torch.manual_seed(options.seed if options.ticket_seed is None else options.ticket_seed)
        ratios = [metadata["settings"].get(name) for name in ("tau_head", "tau_ffn")]
        if not all(isinstance(ratio, (int, float)) and 0 <= ratio < 1 for ratio in ratios):
            raise BadInput(f"{path} does not say its ratios: run {command} again")
        masks = draw_masks(*(torch.rand(mask.shape) for mask in masks), *ratios)
    return masks, files.sha256(path)
