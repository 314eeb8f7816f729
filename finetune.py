"""Fine-tune a ticket on a task at ordinary cost (Algorithm 2, lines 7-10), or a baseline to compare it with.

    python finetune.py --task rt                      the ticket that draw.py drew for rt
    python finetune.py --task rt --ticket none        the full model
    python finetune.py --task rt --ticket random      as many heads and neurons as the ticket, at random
    python finetune.py --task rt --method freelb      with adversarial training on top; or pgd
    python finetune.py --task rt --ablation no-structure     Table 6: what of the ticket is it that matters?
    torchrun --nproc-per-node 2 finetune.py --task rt        on two GPUs, each taking half of every batch

Fine-tuning starts from the pre-trained weights, theta_0, not from those of the search; what the ticket prunes is
physically gone. The epoch with the best accuracy on a held-out tenth of the training rows is kept, and only that
one sees the test rows, once. Killed and typed again, the command goes on after the last whole epoch.
"""

import math
import shlex
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import data
from baselines.infobert import Anchor, InfoBERT
from bert import Bert, Config, pruning_slices
from checkpoints import huggingface, safetensors
from checkpoints.provenance import is_up_to_date, load_checkpoint, restore_state, training_state, versions
from freelb import freelb, pgd
from gates import draw_masks
from inputs.batches import TokenizedSplit, rows_sha256
from inputs.tokenizer import Tokenizer
from runtime import cli, distributed, files, optim
from runtime.cli import BadInput, option
from runtime.cpu import keep_memory
from runtime.device import (
    DEFAULT_MODEL,
    MODEL_HELP,
    autocast,
    peak_memory,
    pick_device,
    pick_precision,
    precision_name,
    run_banner,
)
from runtime.embeddings import restore_vocabulary, restrict_vocabulary
from sharing import export

# method -> its adversary: K, size of a step, first magnitude, largest norm. InfoBERT's are its authors' own.
ADVERSARIES = {
    "vanilla": (1, 0.0, 0.0, 0.0),
    "pgd": (3, 0.03, 0.05, 0.2),
    "freelb": (3, 0.03, 0.05, 0.2),
    "infobert": (3, 0.04, 0.08, 0.0),
}
ABLATIONS = ("no-initialization", "no-structure")


@dataclass
class Options:
    task: str = option("rt", f"{', '.join(data.TASKS)}; or a file of one's own: .csv, .tsv, .jsonl")
    text_columns: tuple = option(("text",), "of one's own file: the column with the text, or two for pairs")
    label_column: str = option("label", "of one's own file")
    data_revision: str = option(None, "branch or commit of the task on the hub, instead of the pinned one")
    model: str = option(DEFAULT_MODEL, MODEL_HELP)
    revision: str = option(
        None, "branch or commit of a model on the hub; bert-base-uncased and roberta-base are pinned"
    )
    ticket: str = option(
        "drawn", "drawn: that of draw.py --task TASK; none: the full model; random; or a file, also robustt.py's"
    )
    method: str = option("vanilla", "ordinary training, or adversarial", choices=tuple(ADVERSARIES))
    ablation: str = option(
        None,
        "of the ticket: all its weights initialized anew; or, of the full model, those that the ticket prunes",
        choices=ABLATIONS,
    )
    output: str = option("runs", "folder for what is made; this script writes below OUTPUT/MODEL/TASK")
    seed: int = option(0, "of all that is random; each seed has a folder of its own", at_least=0, below=2**63)
    epochs: int = option(10, "passes over the training rows", at_least=1)
    train_rows: int = option(None, "train on so many rows, always the same, instead of all", at_least=1)
    batch_size: int = option(32, "rows a step", at_least=1)
    max_length: int = option(None, "tokens a text is cut to, instead of the task's", at_least=3)
    learning_rate: float = option(1e-4, "eta, AdamW's, at its peak", above=0)
    warmup: float = option(0.1, "share of all steps in which the learning rate rises", at_least=0, below=1)
    weight_decay: float = option(0.01, "AdamW's, on matrices", at_least=0)
    clip_norm: float = option(1.0, "largest norm of the whole gradient", above=0)
    adv_steps: int = option(None, "K, ascent steps of the adversarial methods [3]", at_least=1)
    adv_lr: float = option(None, "size of an ascent step [0.03; infobert: 0.04]", at_least=0)
    adv_init_mag: float = option(None, "magnitude of the initial perturbation [0.05; infobert: 0.08]", at_least=0)
    adv_max_norm: float = option(
        None, "the perturbation's largest L2 norm per example, 0: no bound [0.2; infobert: 0]", at_least=0
    )
    alpha: float = option(5e-3, "InfoBERT's, of the anchored features", at_least=0)
    beta: float = option(5e-3, "InfoBERT's, of the information bottleneck", at_least=0)
    grad_accum_steps: int = option(1, "parts of a step, one after another, where memory is short", at_least=1)
    checkpointing: bool = option(
        False, "compute activations twice instead of keeping them: less memory, a third more work"
    )
    precision: str = option("auto", "of matrix products; auto: bf16 where it is fast", choices=("auto", "bf16", "fp32"))
    export_hf: str = option(
        None, "also write a dense copy, zeros where pruned, that transformers loads, to this folder"
    )
    overwrite: bool = option(
        False, "replace a model that other settings made in the same folder; and whatever is in that of --export-hf"
    )


NOT_SETTINGS = ("output", "overwrite", "export_hf", "grad_accum_steps", "checkpointing")  # a run may go on with others


def main():
    options = cli.parse(Options, __doc__)
    keep_memory()
    device = pick_device()
    distributed.init_distributed(device)
    dtype = pick_precision(device, options.precision)
    print(run_banner(options.model, device, dtype))
    task = data.find_task(options.task, tuple(options.text_columns), options.label_column)
    folder = files.output_folder(options.output, options.model) / files.task_folder(options.task)
    with distributed.main_process_first():
        source, model_sha256 = data.find_model(options.model, options.revision)
        config = Config.read(source)
        masks, ticket_sha256 = find_ticket(options, folder / "ticket.safetensors", model_sha256, config)
        tokenizer = Tokenizer(source)
        if (options.max_length or 0) > config.max_length:
            reads = f"{options.model} reads at most {config.max_length} tokens"
            raise BadInput(f"--max-length {options.max_length}: {reads}")
        max_length = min(options.max_length or task.max_length, config.max_length)
        splits = task.load(options.data_revision)
        splits["train"] = data.first_rows(splits["train"], options.train_rows, options.task)
        task_sha256 = rows_sha256(tokenizer, max_length, *splits.values())
        sets = {name: TokenizedSplit(tokenizer, rows, max_length, device) for name, rows in splits.items()}
    folder = folder / files.run_name(options)
    del splits  # the texts; from here on there are token ids
    print(f"task {options.task}: {', '.join(f'{len(rows):,} {name}' for name, rows in sets.items())} rows; {task.note}")
    longer = sum(int(rows.cut) for rows in sets.values())
    print(f"ticket: {options.ticket}" + f"; {longer:,} texts are cut to {max_length} tokens" * (longer > 0))

    settings = {name: value for name, value in asdict(options).items() if name not in NOT_SETTINGS}
    settings["ticket"] = Path(options.ticket).name  # which one it is its sha256 tells
    own = dict(zip(("adv_steps", "adv_lr", "adv_init_mag", "adv_max_norm"), ADVERSARIES[options.method]))
    own |= {"alpha": Options.alpha, "beta": Options.beta}
    idle = {"vanilla": tuple(own), "infobert": ()}.get(options.method, ("alpha", "beta"))
    for name, value in own.items():
        if name in idle and settings[name] != getattr(Options, name):
            print(f"--{name.replace('_', '-')} {settings[name]} has no effect with --method {options.method}")
        settings[name] = value if name in idle or settings[name] is None else settings[name]
    provenance = {
        "script": "finetune.py",
        "task_sha256": task_sha256,
        "settings": settings | {"precision": precision_name(dtype)},
        "model_sha256": model_sha256,
        "config": asdict(config),
        "ticket_sha256": ticket_sha256,
        "versions": versions(),
    }
    if options.export_hf and not isinstance(masks, tuple) and Bert.load(source).config.is_pruned:
        raise BadInput(f"{options.model} was pruned elsewhere, by masks unknown here: it cannot be exported dense")
    is_exported = options.export_hf and distributed.broadcast_from_main(
        lambda: export.find(options, source, folder, provenance)
    )
    finished = folder / "model.safetensors"
    with distributed.file_lock(folder / "finetune.state.safetensors"):
        if not distributed.broadcast_from_main(lambda: is_up_to_date(finished, provenance, options.overwrite)):
            model, weight_masks = starting_point(options, source, masks, task)
            finetune(options, provenance, model.to(device), weight_masks, sets, folder, tokenizer, task, dtype)
        if distributed.is_main_process():
            for leftover in folder.glob("*.state.safetensors"):
                leftover.unlink()
    distributed.shutdown()
    if not distributed.is_main_process():
        return
    metrics = files.read_json(folder / "metrics.json")
    print(
        f"best of {options.epochs} epochs by the held-out rows: epoch {metrics['best_epoch']}, "
        f"{metrics['validation_accuracy']:.2%} there, {metrics['test_accuracy']:.2%} on the test rows"
    )
    print(f"{metrics['parameters']:,} parameters, {metrics['seconds']:.0f} s of training; model: {folder}")
    if options.export_hf:
        if not is_exported:
            pruned = None if options.ablation == "no-structure" or isinstance(masks, dict) else masks
            export.write(Path(options.export_hf), folder, pruned, tokenizer, task, provenance)
        print(f"for transformers, with zeros where the ticket pruned: {options.export_hf}")


def reload(folder, task, splits, options, device):
    """(model, tokenizer, tokens that a text is cut to, notes) of what main() made of options.task in `folder`.

    Raises BadInput where it was fine-tuned on other rows than those of `splits`, the task's, so that its accuracy is
    not theirs and its training rows may be their test rows: a file of one's own may have changed, or have a namesake.
    """
    model, tokenizer = Bert.load(folder).to(device), Tokenizer(folder)
    metadata = safetensors.read_with_metadata(folder / "model.safetensors")[1]
    if metadata.get("script") != "finetune.py":
        raise BadInput(f"{folder} was not made by finetune.py: give another --output")
    length = min(metadata["settings"]["max_length"] or task.max_length, model.config.max_length)
    count = min(metadata["settings"]["train_rows"] or math.inf, len(splits["train"]))
    before = splits | {"train": data.first_rows(splits["train"], count, options.task)}
    if rows_sha256(tokenizer, length, *before.values()) != metadata["task_sha256"]:
        raise BadInput(
            f"{folder} was fine-tuned on other rows than those of {options.task}: give finetune.py's --text-columns, "
            "--label-column and --data-revision, or fine-tune with --overwrite"
        )
    return model, tokenizer, length, metadata


def starting_point(options, source, masks, task):
    """(the model that is fine-tuned, {name: mask} of its single weights that are held at 0)."""
    torch.manual_seed(options.seed)
    model = Bert.load(source, num_labels=len(task.labels))
    for remark in huggingface.load_report(model):
        print(remark)
    if masks is None or isinstance(masks, dict):
        return model, masks or {}
    model = without_structure(model, *masks) if options.ablation == "no-structure" else model.pruned(*masks)
    if options.ablation == "no-initialization":
        model.apply(model.initialize)
    return model, {}


def find_ticket(options, drawn, model_sha256, config):
    """((head mask, FFN mask), sha256 of the ticket's file) as --ticket says; (None, None) for the full model; of a
    ticket by robustt.py, {name: mask of a weight} in place of the two.

    Raises BadInput where the ticket is not there, is no ticket, or was drawn from another model.
    """
    if options.ticket == "none":
        if options.ablation:
            raise BadInput(f"--ablation {options.ablation} is of a ticket: --ticket none has none")
        return None, None
    path = drawn if options.ticket in ("drawn", "random") else Path(options.ticket)
    draw = f"python draw.py --task {shlex.quote(options.task)}{cli.flags(options, 'model', 'output')}"
    if not path.is_file():
        remedy = f"{draw} makes it"
        raise BadInput(f"the ticket {path} is not there: {remedy if path == drawn else 'give drawn, random or none'}")
    tensors, metadata = safetensors.read_with_metadata(path)
    of_weights = metadata.get("script") == "robustt.py"
    if not of_weights and (metadata.get("script") != "draw.py" or not {"head", "ffn"} <= tensors.keys()):
        raise BadInput(f"{path} is no ticket: give a file that draw.py or robustt.py wrote")
    drawn_for = metadata["settings"].get("task", options.task)
    if (drawn_for in data.TASKS) != (options.task in data.TASKS) and path == drawn:  # imdb and one's own imdb.csv
        raise BadInput(f"{path} was drawn for {drawn_for}: {draw} draws it anew")
    if metadata.get("model_sha256") != model_sha256:
        raise BadInput(f"{path} was drawn for another model than {options.model}")
    if of_weights:
        if options.ablation:
            raise BadInput(f"--ablation {options.ablation} is of a ticket of heads and neurons, not of single weights")
        return tensors, files.sha256(path)
    masks = tensors["head"], tensors["ffn"]
    for mask, width in zip(masks, (config.num_attention_heads, config.intermediate_size)):
        if mask.dtype != torch.bool or mask.shape != (config.num_hidden_layers, width):
            raise BadInput(f"{path} has a mask that does not fit the model: draw it again")
    if not masks[0].any(1).all():
        raise BadInput(f"{path} leaves a layer without a head: draw it again")
    if options.ticket == "random":
        torch.manual_seed(options.seed)
        ratios = metadata["settings"]["tau_head"], metadata["settings"]["tau_ffn"]
        masks = draw_masks(*(torch.rand(mask.shape) for mask in masks), *ratios)
    return masks, files.sha256(path)


def finetune(options, provenance, model, weight_masks, sets, folder, tokenizer, task, dtype):
    """Algorithm 2, lines 7-9. Writes the best epoch's model and metrics.json into `folder`. weight_masks: {name: mask},
    false at single weights that are held at 0."""
    all_words, device = model.word_embeddings.weight.detach(), model.word_embeddings.weight.device
    model, words = restrict_vocabulary(model, *sets.values())
    held = {model.get_parameter(name): mask.to(device) for name, mask in weight_masks.items()}
    for weight, mask in held.items():
        weight.data.mul_(mask)
    adversary = {name: provenance["settings"][f"adv_{name}"] for name in ("steps", "lr", "init_mag", "max_norm")}
    adversary["accumulate"] = options.grad_accum_steps
    ascend = pgd if options.method == "pgd" else freelb
    parts, info = {"model": model}, None
    if options.method == "infobert":
        parts["anchor"] = Anchor(model.config.hidden_size).to(device)
        info = InfoBERT(model, parts["anchor"], options.alpha, options.beta, options.batch_size)
    model.checkpointing = options.checkpointing
    trained = distributed.together(**parts)
    groups = optim.decay_groups(trained, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)
    state = folder / "finetune.state.safetensors"
    seconds, memory, scores = 0.0, 0, []  # the validation accuracy of each epoch

    def best(scores):
        """Where the weights of the best of these epochs are: a file of its own, so that a kill never parts the two."""
        return folder / f"epoch{scores.index(max(scores)) + 1}.state.safetensors"

    tensors, metadata = distributed.broadcast_from_main(lambda: load_checkpoint(state, provenance, options.overwrite))
    if tensors:
        restore_state(tensors, optimizer, **parts)
        seconds, memory, scores = metadata["seconds"], metadata["peak_memory"], metadata["scores"]
    steps_per_epoch = -(-len(sets["train"]) // options.batch_size)
    steps = options.epochs * steps_per_epoch
    step = len(scores) * steps_per_epoch
    bar = cli.progress(steps, step, "fine-tune")
    for epoch in range(len(scores), options.epochs):
        start = time.perf_counter()
        total = torch.zeros((), device=device)  # a list of losses would fragment the memory
        generator = np.random.Generator(np.random.PCG64([options.seed, epoch]))
        model.train()
        for batch in sets["train"].batches(options.batch_size, generator):
            optim.seed_step(options.seed, step)

            def loss_for(rows):
                part = batch.rows(rows)
                share = len(part[-1]) / len(batch[-1])
                if info is not None:
                    return info.losses(*part, share)
                return (lambda delta: model.class_loss(*part, delta=delta) * share), None

            with autocast(device, dtype):
                present = batch.token_mask
                total += distributed.gradients(trained, ascend, loss_for, present, model.config.hidden_size, **adversary)
            for weight, mask in held.items():  # at 0 they stay: AdamW decays nothing, and has no gradient to add up
                weight.grad.mul_(mask)
            torch.nn.utils.clip_grad_norm_(trained.parameters(), options.clip_norm)
            optim.set_learning_rate(optimizer, options.learning_rate, step, steps, options.warmup)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
        seconds += time.perf_counter() - start
        mean_loss = total.item() / steps_per_epoch
        if not math.isfinite(mean_loss):
            raise BadInput(f"training diverged in epoch {epoch + 1}: lower --learning-rate {options.learning_rate:g}")
        scores.append(accuracy(model, sets["validation"], options.batch_size, dtype))
        memory = max(memory, peak_memory(device))
        if distributed.is_main_process():
            if scores[-1] > max(scores[:-1], default=-1.0):
                safetensors.write_safetensors(best(scores), model.state_dict(), provenance)
            metadata = provenance | {"seconds": seconds, "peak_memory": memory, "scores": scores}
            safetensors.write_safetensors(state, training_state(optimizer, **parts), metadata)
            for older in set(folder.glob("epoch*.state.safetensors")) - {best(scores)}:
                older.unlink()
        bar.set_postfix_str(f"loss {mean_loss:.3f}, held-out accuracy {scores[-1]:.2%}")
    bar.close()
    model.load_state_dict(distributed.broadcast_from_main(lambda: dict(safetensors.read_safetensors(best(scores))[0])))
    test_accuracy, best_epoch = accuracy(model, sets["test"], options.batch_size, dtype), scores.index(max(scores)) + 1
    rates = (
        optim.learning_rate(options.learning_rate, step, steps, options.warmup)
        for step in range(best_epoch * steps_per_epoch)
    )
    model = restore_vocabulary(model, words, all_words, math.prod(1 - rate * options.weight_decay for rate in rates))
    metrics = {
        "best_epoch": best_epoch,
        "validation_accuracy": max(scores),
        "validation_accuracy_by_epoch": scores,
        "test_accuracy": test_accuracy,
        "test_rows": len(sets["test"]),
        "parameters": sum(p.numel() for p in model.parameters())
        - sum((~mask).sum().item() for mask in weight_masks.values()),
        "seconds": seconds,
        "tokens_per_second": options.epochs * len(sets["train"].ids) / seconds,
        "peak_memory": max(memory, peak_memory(device)),
    }
    if distributed.is_main_process():
        files.write_json(folder / "metrics.json", provenance | metrics)
        tokenizer.save(folder)
        model.save(folder, task.labels, provenance)  # last: where it is, the run is complete


def without_structure(model, head_mask, ffn_mask):
    """The full model with what the masks would prune initialized anew: Table 6's ablation of the structure."""
    state, fresh = model.state_dict(), Bert(model.config).state_dict()
    for name, kept, dimension in pruning_slices(head_mask, ffn_mask, model.config.head_size):
        shape = [-1 if i == dimension else 1 for i in range(state[name].dim())]
        state[name] = torch.where(kept.view(shape), state[name], fresh[name])
    return model.with_state(model.config, state)


@torch.inference_mode()
def accuracy(model, rows, batch_size, dtype):
    """The share of rows that the model classifies as labelled, without dropout; the processes share the batches."""
    model.eval()
    right = torch.zeros((), device=model.word_embeddings.weight.device)
    batches = islice(rows.batches(batch_size), distributed.RANK, None, distributed.WORLD)
    for ids, mask, segments, labels in batches:
        with autocast(ids.device, dtype):
            right += (model.class_logits(ids, mask, segments).argmax(1) == labels).sum()
    return distributed.all_reduce_sum(right).item() / len(rows)


if __name__ == "__main__":
    cli.run(main)
