"""Robust lottery tickets (Zheng et al. 2022), RobustT: which single weights of a fine-tuned model resist an adversary.

    python finetune.py --task rt --ticket none                          fine-tune
    python robustt.py --task rt                                         learn masks, the weights frozen; draw the ticket
    python finetune.py --task rt --ticket runs/minilm/rt/robustt-seed0.safetensors      retrain from theta_0

Every weight w of the encoder's matrices and of the pooler becomes w z, with z a hard concrete gate (Louizos et al.
2018) whose score is all that is trained, on FreeLB's loss plus lambda times the expected share of open gates (the mean
of the matrices' shares, whatever their sizes). The weights with the smallest scores, of all matrices together, are
pruned. Unlike ORTicket's, such a ticket belongs to its task, and saves neither time nor memory: it is a mask over the
dense model. Defaults are those of the authors' scripts. Killed and typed again, the command goes on after the last
whole epoch.
"""

import math
import shlex
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

import data
import finetune
from checkpoints import safetensors
from checkpoints.provenance import is_up_to_date, load_checkpoint, restore_state, training_state, versions
from freelb import freelb
from gates import draw_mask
from inputs.batches import TokenizedSplit, rows_sha256
from runtime import cli, distributed, files, optim
from runtime.cli import BadInput, option
from runtime.cpu import keep_memory
from runtime.device import DEFAULT_MODEL, autocast, pick_device, pick_precision, precision_name, run_banner

RETRAINED = (  # options of finetune.py with which the ticket is retrained as the full model was trained
    *("model", "revision", "output", "text_columns", "label_column", "data_revision", "seed", "epochs", "train_rows"),
    *("batch_size", "max_length", "learning_rate", "warmup", "weight_decay", "clip_norm"),
    "precision",
)
LEFT, RIGHT, TEMPERATURE = -0.1, 1.1, 2 / 3  # the stretched interval and the temperature of hard concrete gates


@dataclass
class Options:
    task: str = option("rt", f"{', '.join(data.TASKS)}; or a file of one's own: .csv, .tsv, .jsonl")
    text_columns: tuple = option(("text",), "of one's own file: the column with the text, or two for pairs")
    label_column: str = option("label", "of one's own file")
    data_revision: str = option(None, "branch or commit of the task on the hub, instead of the pinned one")
    model: str = option(DEFAULT_MODEL, "the model that finetune.py --ticket none fine-tuned")
    output: str = option("runs", "folder that finetune.py wrote to; the ticket goes to OUTPUT/MODEL/TASK")
    seed: int = option(0, "of the fine-tuned model, and of all that is random", at_least=0, below=2**63)
    sparsity: float = option(0.3, "share of the weights that are pruned", at_least=0, below=1)
    epochs: int = option(20, "passes over the training rows", at_least=1)
    train_rows: int = option(None, "as of finetune.py", at_least=1)
    batch_size: int = option(32, "rows a step", at_least=1)
    learning_rate: float = option(0.1, "of the scores, at its peak", above=0)
    warmup: float = option(0.1, "share of all steps in which the learning rate rises", at_least=0, below=1)
    weight_decay: float = option(1e-6, "AdamW's", at_least=0)
    regularization: float = option(0.5, "lambda at last: 0 for a tenth of all steps, then rising for three", at_least=0)
    initial: float = option(0.9, "value of the gates at first", above=0, below=1)
    adv_steps: int = option(5, "K, FreeLB's ascent steps", at_least=1)
    adv_lr: float = option(0.03, "size of an ascent step", at_least=0)
    adv_init_mag: float = option(0.05, "magnitude of the initial perturbation", at_least=0)
    adv_max_norm: float = option(0.0, "the perturbation's largest L2 norm per example, 0: no bound", at_least=0)
    clip_norm: float = option(1.0, "largest norm of the loss's gradient", above=0)
    precision: str = option("auto", "of matrix products; auto: bf16 where it is fast", choices=("auto", "bf16", "fp32"))
    overwrite: bool = option(False, "replace a ticket that other settings made")


class Gates(nn.Module):
    """Hard concrete gates over a weight: `scores` of its shape are what is learned."""

    def __init__(self, shape, initial):
        super().__init__()
        p = (initial - LEFT) / (RIGHT - LEFT)
        self.scores = nn.Parameter(torch.full(shape, math.log(p / (1 - p))))

    def forward(self, weight):
        s = self.scores
        if self.training:
            u = torch.rand_like(s).clamp(1e-4, 1 - 1e-4)
            s = (u.log() - (-u).log1p() + s) / TEMPERATURE
        return weight * (s.sigmoid() * (RIGHT - LEFT) + LEFT).clamp(0, 1)

    def open_share(self):
        """The expected share of gates above 0: the L0 norm."""
        return (self.scores - TEMPERATURE * math.log(-LEFT / RIGHT)).sigmoid().mean()


def main():
    options = cli.parse(Options, __doc__)
    if distributed.WORLD > 1:
        raise BadInput("robustt.py works in one process: start it without torchrun")
    keep_memory()
    device = pick_device()
    dtype = pick_precision(device, options.precision)
    print(run_banner(options.model, device, dtype))
    task = data.find_task(options.task, tuple(options.text_columns), options.label_column)
    folder = files.output_folder(options.output, options.model) / files.task_folder(options.task)
    source = folder / f"none-vanilla-seed{options.seed}"
    command = f"python finetune.py --task {shlex.quote(options.task)}"
    if not (source / "model.safetensors").is_file():
        same = ("model", "output", "seed", "text_columns", "label_column", "data_revision", "train_rows")
        raise BadInput(f"{source} is not there: {command}{cli.flags(options, *same)} --ticket none makes it")
    splits = task.load(options.data_revision)
    model, tokenizer, length, metadata = finetune.reload(source, task, splits, options, device)
    train = data.first_rows(splits["train"], options.train_rows, options.task)
    rows = TokenizedSplit(tokenizer, train, length, device)
    print(f"task {options.task}: {len(rows):,} training rows; the weights of {source} stay as they are")
    settings = {key: value for key, value in asdict(options).items() if key not in ("output", "overwrite")}
    provenance = {
        "script": "robustt.py",
        "settings": settings | {"precision": precision_name(dtype)},
        "model_sha256": metadata["model_sha256"],
        "finetuned_sha256": files.sha256(source / "model.safetensors"),
        "task_sha256": rows_sha256(tokenizer, length, train),
        "versions": versions(),
    }
    path = folder / f"robustt-seed{options.seed}.safetensors"
    state = path.with_suffix(".state.safetensors")
    with distributed.file_lock(state):
        if not is_up_to_date(path, provenance, options.overwrite):
            search(options, provenance, model, rows, path, state, dtype)
        state.unlink(missing_ok=True)
    kept = safetensors.read_with_metadata(path)[0]
    total = sum(mask.numel() for mask in kept.values())
    left = sum(mask.sum().item() for mask in kept.values())
    print(f"{left:,} of {total:,} weights are left; ticket: {path}")
    given = metadata["settings"] | {"model": options.model, "output": options.output}
    given |= {"text_columns": tuple(given["text_columns"])}
    if given["precision"] == precision_name(pick_precision(device, "auto")):
        given["precision"] = "auto"
    before = finetune.Options(**given)
    print(f"next: {command}{cli.flags(before, *RETRAINED)} --ticket {shlex.quote(str(path))}")


def search(options, provenance, model, rows, path, state, dtype):
    """Learn the gates, draw the ticket: {name of a weight: bool of its shape, false where pruned}, to `path`."""
    torch.manual_seed(options.seed)
    model.requires_grad_(False)
    gated = {name: model.get_submodule(name) for name in matrices(model)}
    gates = nn.ModuleList(Gates(of.weight.shape, options.initial).to(of.weight.device) for of in gated.values())
    for module, gate in zip(gated.values(), gates):
        parametrize.register_parametrization(module, "weight", gate)
    optimizer = torch.optim.AdamW(
        gates.parameters(), options.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    adversary = {"steps": options.adv_steps, "lr": options.adv_lr}
    adversary |= {"init_mag": options.adv_init_mag, "max_norm": options.adv_max_norm}
    steps_per_epoch = -(-len(rows) // options.batch_size)
    steps, first = options.epochs * steps_per_epoch, 0
    tensors, metadata = load_checkpoint(state, provenance, options.overwrite)
    if tensors:
        restore_state(tensors, optimizer, gates=gates)
        first = metadata["epochs_done"]
    step = first * steps_per_epoch
    bar = cli.progress(steps, step, "masks")
    model.train()
    for epoch in range(first, options.epochs):
        generator = np.random.Generator(np.random.PCG64([options.seed, epoch]))
        for batch in rows.batches(options.batch_size, generator):
            optim.seed_step(options.seed, step)
            with autocast(batch[0].device, dtype):
                loss = freelb(
                    lambda delta: model.class_loss(*batch, delta=delta),
                    batch.token_mask,
                    model.config.hidden_size,
                    **adversary,
                )
            nn.utils.clip_grad_norm_(gates.parameters(), options.clip_norm)
            ramp = min(1.0, max(0.0, (step / steps - 0.1) / 0.3))
            share = torch.stack([gate.open_share() for gate in gates]).mean()
            (options.regularization * ramp * share).backward()
            optim.set_learning_rate(optimizer, options.learning_rate, step, steps, options.warmup)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            if not bar.disable:
                bar.set_postfix_str(f"loss {loss:.3f}, open {share:.1%}", refresh=False)
        if not math.isfinite(loss):
            raise BadInput(f"training diverged in epoch {epoch + 1}: lower --learning-rate {options.learning_rate:g}")
        metadata = provenance | {"epochs_done": epoch + 1}
        safetensors.write_safetensors(state, training_state(optimizer, gates=gates), metadata)
    bar.close()
    scores = {f"{name}.weight": gate.scores.detach().cpu() for name, gate in zip(gated, gates)}
    safetensors.write_safetensors(path, draw(scores, options.sparsity), provenance)


def matrices(model):
    """Names of the modules whose weights are gated: those of the layers, and the pooler."""
    kinds = ("query_key_value", "attention_output", "intermediate", "output")
    return [f"layers.{i}.{kind}" for i in range(len(model.layers)) for kind in kinds] + ["pooler"]


def draw(scores, sparsity):
    """{name: scores} -> {name: bool}: exactly ceil(sparsity N) false, those with the smallest scores of all together,
    the earlier first among equals."""
    kept = draw_mask(torch.cat([score.flatten() for score in scores.values()])[None], sparsity)[0]
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts)}


if __name__ == "__main__":
    cli.run(main)
