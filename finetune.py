"""Algorithm 2, lines 6 to 10: fine-tune a ticket, or a baseline for comparison, on a task.

    python finetune.py --task rt                            the ticket that draw.py drew for rt
    python finetune.py --task rt --ticket none              the full model; or random, a random ticket of the same size
    python finetune.py --task rt --method freelb            adversarial training; or pgd, infobert
    python finetune.py --task rt --ablation no-structure    the ablations of Table 6
    torchrun --nproc-per-node 2 finetune.py --task rt       on two GPUs, each with half of every batch

Fine-tuning starts from the pre-trained weights theta_0, not from those of the search. Only the epoch with the best
accuracy on held-out training rows is kept and tested. Interrupted runs resume from the last epoch when rerun.
"""

import runtime.start  # noqa: F401 # isort: skip

from dataclasses import asdict, dataclass

import torch
from torch import nn

import data
from baselines.infobert import Anchor, InfoBERT
from bert import Bert, Config, pruning_slices
from checkpoints import huggingface
from checkpoints.provenance import is_up_to_date, software, write_result
from checkpoints.runs import FinetuneRun, effective_settings, read_metrics
from checkpoints.tickets import find_ticket
from freelb import ADVERSARIES, freelb, initial_delta
from inputs.batches import TokenizedSplit, rows_sha256
from inputs.finetuned import correct_by_class, rare_class_metrics
from inputs.splits import first_rows
from inputs.tokenizer import Tokenizer
from runtime import cli, distributed, files, optim
from runtime.cli import BadInput, first_few, option
from runtime.device import DEFAULT_MODEL, MODEL_HELP, MachineOptions, autocast, precision_name
from runtime.embeddings import restore_vocabulary, restrict_vocabulary
from sharing.export import export, is_exported

ABLATIONS = ("no-initialization", "no-structure")


@dataclass
class Options(data.TaskOptions, MachineOptions):
    model: str = option(DEFAULT_MODEL, MODEL_HELP, group="model")
    revision: str = option(None, "branch or commit of a model on the hub", group="model")
    ticket: str = option("drawn", "drawn (by draw.py), none, random, or a file", group="model")
    ticket_seed: int = option(None, "seed of a random ticket [--seed]", at_least=0, below=2**63, group="model")
    ablation: str = option(
        None,
        "no-initialization: new matrices in the ticket; no-structure: new weights instead of pruning",
        choices=ABLATIONS,
        group="model",
    )
    task: str = option("rt", f"{', '.join(data.TASKS)}; a .csv, .tsv or .jsonl file, or a folder", group="data")
    train_rows: int = option(None, "train on this many rows, the same for every seed [all]", at_least=1, group="data")
    max_length: int = option(None, "truncate texts to this many tokens [the task's]", at_least=3, group="data")
    method: str = option("vanilla", "ordinary or adversarial training", choices=tuple(ADVERSARIES), group="adversary")
    adv_steps: int = option(None, "K, passes per step [the method's]", at_least=1, group="adversary")
    adv_lr: float = option(None, "size of an ascent step [the method's]", at_least=0, group="adversary")
    adv_init_mag: float = option(None, "size of the first delta [the method's]", at_least=0, group="adversary")
    adv_max_norm: float = option(None, "norm bound epsilon; 0: none [the method's]", at_least=0, group="adversary")
    alpha: float = option(5e-3, "weight of InfoBERT's anchored features", at_least=0, group="adversary")
    beta: float = option(5e-3, "weight of InfoBERT's information bottleneck", at_least=0, group="adversary")
    epochs: int = option(10, "N, number of epochs", at_least=1, group="optimization")
    batch_size: int = option(32, "rows per step", at_least=1, group="optimization")
    learning_rate: float = option(None, "eta [2e-5; 1e-4 for models smaller than base]", above=0, group="optimization")
    warmup: float = option(0.1, "fraction of the steps with warm-up", at_least=0, below=1, group="optimization")
    weight_decay: float = option(0.01, "of AdamW, only on matrices", at_least=0, group="optimization")
    clip_norm: float = option(1.0, "maximum norm of the gradient", above=0, group="optimization")
    seed: int = option(0, "random seed", at_least=0, below=2**63, group="optimization")
    output: str = option("runs", "folder; results go to OUTPUT/MODEL/TASK", group="output")
    export_hf: str = option(None, "also write a dense copy for transformers to this folder", group="output")
    overwrite: bool = option(False, "replace results; an unfinished run of this command resumes", group="output")


# options with which a run may resume; --device and --grad-accum-steps change rounding, dropout, InfoBERT's estimates
NOT_SETTINGS = ("output", "overwrite", "export_hf", "device", "grad_accum_steps", "checkpointing")


def main():
    options = cli.parse(Options, __doc__)
    device, dtype = distributed.start(options)
    task = data.find_task(options.task, tuple(options.text_columns), options.label_column, options.drop_labels)
    folder = files.writable(files.model_folder(options.output, options.model)) / files.task_folder(options.task)
    with distributed.main_process_first():
        source, model_sha256 = data.find_model(options.model, options.revision)
        tokenizer, config = Tokenizer(source), Config.read(source)
        options.learning_rate = options.learning_rate or (2e-5 if config.hidden_size >= 768 else 1e-4)
        masks, ticket_sha256 = find_ticket(options, folder / "ticket.safetensors", model_sha256, config)
        if (options.max_length or 0) > config.max_length:
            raise BadInput(
                f"--max-length {options.max_length}: {options.model} reads at most {config.max_length} tokens"
            )
        max_length = min(options.max_length or task.max_length, config.max_length)
        rows = task.load(options.data_revision)
        rows["train"] = first_rows(rows["train"], options.train_rows, options.task)
        task_sha256 = rows_sha256(tokenizer, max_length, *rows.values())
        splits = {name: TokenizedSplit(tokenizer, part, max_length, device) for name, part in rows.items()}
    del rows  # the texts are not needed any more
    counts = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    print(f"task {options.task}: {counts} rows; {task.note}")
    truncated = sum(split.num_truncated for split in splits.values())
    print(f"ticket: {options.ticket}; {truncated:,} texts truncated to {max_length} tokens")
    folder /= files.run_name(options)
    provenance = {
        "script": "finetune.py",
        "settings": effective_settings(options, NOT_SETTINGS) | {"precision": precision_name(dtype)},
        "task_sha256": task_sha256,
        "model_sha256": model_sha256,
        "ticket_sha256": ticket_sha256,
        "config": asdict(config),
        **software(__file__),
    }
    wants_export = options.export_hf and distributed.broadcast_from_main(
        lambda: not is_exported(options, source, masks, folder, provenance)
    )
    path = folder / "model.safetensors"
    with distributed.file_lock(folder / "finetune.state.safetensors"):
        if not distributed.broadcast_from_main(lambda: is_up_to_date(path, provenance, options.overwrite)):
            model, weight_masks = starting_point(options, source, masks, task)
            run_finetuning(options, model.to(device), weight_masks, splits, folder, provenance, tokenizer, task, dtype)
        if distributed.is_main_process():
            for leftover in folder.glob("*.state.safetensors"):
                leftover.unlink()
    distributed.shutdown()
    if distributed.is_main_process():
        report(options, folder)
        if wants_export:
            export(options, source, folder, masks, tokenizer, task, provenance)


def finetune(options, model, weight_masks, splits, run, dtype):
    """Algorithm 2, lines 7 to 10, on model = m * theta_0. weight_masks: {name: mask of a weight}, for RobustT tickets.
    splits: {"train", "validation", "test": TokenizedSplit}. run: FinetuneRun, which logs, saves and resumes. Leaves the
    weights of the best epoch in `model`."""
    modules, infobert = {"model": model}, None
    if options.method == "infobert":
        modules["anchor"] = Anchor(model.config.hidden_size).to(splits["train"].device)
        infobert = InfoBERT(model, modules["anchor"], options.alpha, options.beta, options.batch_size)
    parameters = list(nn.ModuleDict(modules).parameters())
    optimizer = optim.adamw(parameters, options.learning_rate, options.weight_decay)
    adv_steps, adv_lr, adv_init_mag, adv_max_norm, only_last = run.adversary  # the method's, or the options
    first_epoch = run.resume(optimizer, modules)  # 0, or the first epoch that is not done

    for epoch in range(first_epoch, options.epochs):  # Line 7: for epoch <- 1 ... N
        model.train()
        for step, batch in run.batches(epoch):
            optim.seed_step(options.seed, step)
            # ordinary training is K = 1 with delta = 0
            loss, delta = 0.0, initial_delta(batch.token_mask, model.config.hidden_size, adv_init_mag, adv_max_norm)
            for rows in distributed.micro_batches(len(delta), options.grad_accum_steps):  # all rows, or parts of them
                part, extra_loss = batch.rows(rows), None
                share = len(part.labels) / len(batch.labels)

                def loss_of(perturbation):  # L_CrossEntropy: this part's share of the batch mean
                    return model.class_loss(*part, delta=perturbation) * share

                if infobert:
                    loss_of, extra_loss = infobert.losses(*part, share)
                strength = adv_steps, adv_lr, adv_max_norm
                with autocast(delta.device, dtype):
                    loss += freelb(loss_of, delta[rows], part.token_mask, *strength, extra_loss, only_last)
            distributed.sum_gradients(parameters)
            for name, mask in weight_masks.items():  # no gradient, no weight decay: pruned weights stay 0
                model.get_parameter(name).grad.mul_(mask)
            nn.utils.clip_grad_norm_(parameters, options.clip_norm)
            optim.set_learning_rate(optimizer, options.learning_rate, step, run.steps, options.warmup)
            optimizer.step()  # Line 8: theta_ticket <- theta_ticket - eta grad L_CrossEntropy (by AdamW)
            optimizer.zero_grad()
            run.log(loss)
        run.end_epoch(optimizer, modules, accuracy(model, splits["validation"], options.batch_size, dtype))
    run.load_best(model)  # Line 10: return theta_ticket, here of the best epoch


def run_finetuning(options, model, weight_masks, splits, folder, provenance, tokenizer, task, dtype):
    """Fine-tune, test, and write the model and metrics.json into `folder`."""
    weight_masks = {name: mask.to(splits["train"].device) for name, mask in weight_masks.items()}
    all_embeddings = model.word_embeddings.weight.detach()  # (V, d); only those of the task's tokens are trained
    model, word_ids = restrict_vocabulary(model, *splits.values())
    model.checkpointing = options.checkpointing
    run = FinetuneRun(options, splits["train"], folder, provenance)
    finetune(options, model, weight_masks, splits, run, dtype)
    test_accuracy = accuracy(model, splits["test"], options.batch_size, dtype)
    by_class = rare_class_metrics(model, splits, task.labels, options.batch_size, dtype)
    model = restore_vocabulary(model, word_ids, all_embeddings, run.decay())
    pruned = sum((~mask).sum().item() for mask in weight_masks.values())
    metrics = run.metrics() | {
        "test_accuracy": test_accuracy,
        "test_rows": len(splits["test"]),
        "parameters": sum(p.numel() for p in model.parameters()) - pruned,
        **by_class,
    }
    if distributed.is_main_process():
        write_result(folder / "metrics.json", provenance | metrics)
        tokenizer.save(folder)
        model.save(folder, task.labels, provenance)  # last: if this file exists, the run is complete


def starting_point(options, source, masks, task):
    """(model, {name: mask of a weight}) as Algorithm 2, line 6, makes it: m * theta_0 with a new classifier."""
    torch.manual_seed(options.seed)
    model = Bert.load(source, num_labels=len(task.labels))
    for line in huggingface.load_report(model):
        print(line)
    if masks is None:
        return model, {}
    if isinstance(masks, dict):  # RobustT: masks over single weights
        for name, mask in masks.items():
            model.get_parameter(name).data.mul_(mask)
        return model, masks
    if options.ablation == "no-structure":
        return reinitialize_pruned(model, *masks), {}
    model = model.pruned(*masks)  # Line 6: theta <- theta_0, theta_ticket <- m * theta
    if options.ablation == "no-initialization":  # as in EarlyRobust: not the embeddings, not the LayerNorms
        for linear in [module for module in model.modules() if isinstance(module, nn.Linear)]:
            model.initialize(linear)
    return model, {}


def reinitialize_pruned(model, head_mask, ffn_mask):
    """The full model with new weights where the masks would prune: Table 6, without structure."""
    state, fresh = model.state_dict(), Bert(model.config).state_dict()
    for name, kept, dimension in pruning_slices(head_mask, ffn_mask, model.config.head_size):
        shape = [-1 if i == dimension else 1 for i in range(state[name].dim())]
        state[name] = torch.where(kept.view(shape), state[name], fresh[name])
    return model.with_state(model.config, state)


def accuracy(model, split, batch_size, dtype):
    """The share of rows that the model classifies correctly, without dropout."""
    return correct_by_class(model, split, batch_size, dtype).sum().item() / len(split)


def report(options, folder):
    """Print the accuracies, the cost and the folder of the model."""
    metrics = read_metrics(folder)
    print(
        f"best of {options.epochs} epochs on the held-out rows: epoch {metrics['best_epoch']}, "
        f"accuracy {metrics['validation_accuracy']:.2%}; test accuracy {metrics['test_accuracy']:.2%}"
    )
    if by_class := metrics.get("test_correct_by_class"):  # where a class is rare
        shown = first_few(f"{name} {correct:,} of {rows:,}" for name, (correct, rows) in by_class.items())
        print(f"correct test rows per class: {shown}")
    print(f"{metrics['parameters']:,} parameters, {metrics['seconds']:.0f} s of training; model: {folder}")


if __name__ == "__main__":
    cli.run(main)
