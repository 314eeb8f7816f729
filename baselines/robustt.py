"""RobustT, robust lottery tickets (Zheng et al. 2022): which single weights of a fine-tuned model resist an adversary.

    python finetune.py --task rt --ticket none        fine-tune the full model
    python -m baselines.robustt --task rt             learn masks with the weights frozen, then draw the ticket
    python finetune.py --task rt --ticket runs/minilm/rt/robustt-seed0.safetensors      retrain from theta_0

Every weight w of the encoder's matrices and of the pooler becomes w z, where z is a hard concrete gate (Louizos et al.
2018). Only the scores of the gates are trained, on FreeLB's loss + lambda x the expected share of open gates (the mean
of the matrices' shares; query, key and value are three matrices). The weights with the smallest scores over all
matrices are pruned. Such a ticket is a mask over the dense model: it saves neither time nor memory. docs/decisions.md
compares the code with that of the authors.
"""

import math
import shlex
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

import data
from checkpoints import safetensors
from checkpoints.provenance import Checkpoint, is_up_to_date, software
from freelb import freelb, initial_delta
from gates import draw_mask
from inputs.batches import TokenizedSplit, rows_sha256
from inputs.finetuned import load_finetuned
from inputs.splits import first_rows
from runtime import cli, distributed, files, optim
from runtime.cli import BadInput, option
from runtime.device import DEFAULT_MODEL, autocast, faster_ways, precision_name

LEFT, RIGHT, TEMPERATURE = -0.1, 1.1, 2 / 3  # the stretched interval and the temperature of hard concrete gates
RETRAINED = (  # settings of the fine-tuned model, reused for retraining its ticket
    *("revision", *data.COLUMN_OPTIONS, "data_revision", "seed", "epochs", "train_rows", "batch_size"),
    *("max_length", "learning_rate", "warmup", "weight_decay", "clip_norm", "precision"),
)


@dataclass
class Options(data.TaskOptions):
    task: str = option("rt", f"{', '.join(data.TASKS)}; a .csv, .tsv or .jsonl file, or a folder", group="data")
    train_rows: int = option(None, "number of training rows, same as in finetune.py", at_least=1, group="data")
    model: str = option(DEFAULT_MODEL, "the model that finetune.py --ticket none fine-tuned", group="model")
    seed: int = option(0, "seed of the fine-tuned model and of the gates", at_least=0, below=2**63, group="model")
    sparsity: float = option(0.3, "share of the weights that is pruned", at_least=0, below=1, group="gates")
    initial: float = option(0.9, "initial value of the gates", above=0, below=1, group="gates")
    regularization: float = option(0.5, "lambda after its linear ramp", at_least=0, group="gates")
    adv_steps: int = option(5, "K, FreeLB's passes per step", at_least=1, group="adversary")
    adv_lr: float = option(0.03, "size of an ascent step", at_least=0, group="adversary")
    adv_init_mag: float = option(0.05, "magnitude of the initial perturbation", at_least=0, group="adversary")
    adv_max_norm: float = option(0.0, "epsilon, an L2 norm per example; 0: no bound", at_least=0, group="adversary")
    epochs: int = option(20, "passes over the training rows", at_least=1, group="optimization")
    batch_size: int = option(32, "rows per step", at_least=1, group="optimization")
    learning_rate: float = option(0.1, "peak learning rate of the scores", above=0, group="optimization")
    warmup: float = option(0.1, "share of all steps with warm-up", at_least=0, below=1, group="optimization")
    weight_decay: float = option(1e-6, "weight decay of AdamW", at_least=0, group="optimization")
    clip_norm: float = option(1.0, "largest norm of the loss's gradient", above=0, group="optimization")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto: CUDA, then MPS, then CPU", group="machine")
    precision: str = option("auto", "auto: bf16 where it is fast", choices=("auto", "bf16", "fp32"), group="machine")
    output: str = option("runs", "folder of finetune.py; the ticket is written to OUTPUT/MODEL/TASK", group="output")
    overwrite: bool = option(False, "replace results; an unfinished run of this command resumes", group="output")


class Gates(nn.Module):
    """Hard concrete gates over a weight matrix. The learned `scores` have the shape of the weight."""

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
        """The expected share of gates above 0, the L0 norm (Louizos et al. 2018, eq. 12)."""
        return (self.scores - TEMPERATURE * math.log(-LEFT / RIGHT)).sigmoid().mean()


def main():
    options = cli.parse(Options, __doc__)
    if distributed.WORLD > 1:
        raise BadInput("robustt.py runs in one process: start it without torchrun")
    device, dtype = distributed.start(options)
    task = data.find_task(options.task, tuple(options.text_columns), options.label_column, options.drop_labels)
    folder = files.writable(files.model_folder(options.output, options.model)) / files.task_folder(options.task)
    source = folder / f"none-vanilla-seed{options.seed}"
    if not (source / "model.safetensors").is_file():
        same = ("task", "model", "output", "seed", *data.COLUMN_OPTIONS, "data_revision", "train_rows")
        command = f"python finetune.py{cli.flags(options, *same)} --ticket none"
        raise BadInput(f"there is no fine-tuned model in {source}: run {command}")
    splits = task.load(options.data_revision)
    model, tokenizer, max_length, metadata = load_finetuned(source, task, splits, options, device)
    train = first_rows(splits["train"], options.train_rows, options.task)
    rows = TokenizedSplit(tokenizer, train, max_length, device)
    print(f"task {options.task}: {len(rows):,} training rows; the weights of {source} are not changed")
    settings = {key: value for key, value in asdict(options).items() if key not in ("output", "overwrite", "device")}
    provenance = {
        "script": "robustt.py",
        "settings": settings | {"precision": precision_name(dtype)},
        "model_sha256": metadata["model_sha256"],
        "finetuned_sha256": files.sha256(source / "model.safetensors"),
        "task_sha256": rows_sha256(tokenizer, max_length, train),
        **software(__file__),
    }
    path = folder / f"robustt-seed{options.seed}.safetensors"
    state = path.with_suffix(".state.safetensors")
    with distributed.file_lock(state):
        if not is_up_to_date(path, provenance, options.overwrite):
            scores = learn_scores(options, model, rows, Checkpoint(state, provenance, options.overwrite), dtype)
            safetensors.write_safetensors(path, draw(scores, options.sparsity), provenance)
        state.unlink(missing_ok=True)
    masks = torch.cat([mask.flatten() for mask in safetensors.read_with_metadata(path)[0].values()])
    print(f"{masks.sum():,} of {len(masks):,} weights are left; ticket: {path}")
    print(f"next: {retrain_command(options, metadata['settings'], path)}")


def retrain_command(options, settings, ticket):
    """The command that retrains the ticket with the `settings` of the fine-tuned model."""
    flags = {"task": options.task, "model": options.model, "output": options.output, "ticket": ticket}
    flags |= {name: settings[name] for name in RETRAINED if settings[name] is not None}
    values = {name: value if isinstance(value, list) else [value] for name, value in flags.items()}
    words = [f"--{name.replace('_', '-')} {shlex.join(map(str, of))}" for name, of in values.items()]
    return " ".join(["python finetune.py", *words])


def add_gates(model, initial):
    """Put gates on the weights of the encoder and the pooler. Returns ({name: module}, their Gates)."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    gated = {name: module for name, module in linear.items() if name.startswith("layers.") or name == "pooler"}
    gates = nn.ModuleList(Gates(of.weight.shape, initial).to(of.weight.device) for of in gated.values())
    for module, gate in zip(gated.values(), gates):
        parametrize.register_parametrization(module, "weight", gate)  # w -> w z
    return gated, gates


def learn_scores(options, model, rows, checkpoint, dtype):
    """Learn the scores of all gates: {name of a weight: scores of its shape}."""
    torch.manual_seed(options.seed)
    gated, gates = add_gates(model, options.initial)
    lr = options.learning_rate
    optimizer = torch.optim.AdamW(gates.parameters(), lr, weight_decay=options.weight_decay, fused=True)
    steps_per_epoch = math.ceil(len(rows) / options.batch_size)
    steps = options.epochs * steps_per_epoch
    checkpoint.load(optimizer, gates=gates)
    first_epoch = checkpoint.metadata.get("epochs_done", 0)
    faster = faster_ways(rows.device, "fewer --train-rows or --epochs")
    bar = cli.progress(steps, first_epoch * steps_per_epoch, "masks", parts=options.epochs, faster=faster)
    model.train()
    for epoch in range(first_epoch, options.epochs):
        model.zero_grad()  # an interrupted run does not save gradients, so each epoch starts without any
        batches = map(rows.batch, rows.epoch(options.batch_size, options.seed, epoch))
        for step, batch in enumerate(batches, epoch * steps_per_epoch):
            optim.seed_step(options.seed, step)
            mask, max_norm = batch.token_mask, options.adv_max_norm
            delta = initial_delta(mask, model.config.hidden_size, options.adv_init_mag, max_norm)
            # 1. the gradient of FreeLB's loss with the weights w z; all K passes draw the same z
            loss_of = lambda delta: model.class_loss(*batch, delta=delta)  # noqa: E731
            with autocast(delta.device, dtype):
                loss = freelb(loss_of, delta, mask, options.adv_steps, options.adv_lr, max_norm)
            # The authors' norm includes the gradients of the weights, which they do not set to zero between steps
            nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
            # 2. the gradient of lambda x the expected share of open gates. lambda is meant to rise from a tenth to four
            # tenths of the steps, but the authors' step counter adds 3 per step, the number of tensors in a batch
            ramp = min(1.0, max(0.0, (3 * (step + 1) / steps - 0.1) / 0.3))
            open_share = mean_open_share(dict(zip(gated, gates)))
            (options.regularization * ramp * open_share).backward()
            # 3. the step of the optimizer
            optim.set_learning_rate(optimizer, lr, step, steps, options.warmup)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix_str(lambda: f"loss {loss:.3f}, open {open_share:.1%}", refresh=False)
        if not math.isfinite(loss):
            raise BadInput(f"training diverged in epoch {epoch + 1}: lower --learning-rate {lr:g}")
        checkpoint.save(optimizer, {"gates": gates}, metadata={"epochs_done": epoch + 1})
    bar.close()
    return {f"{name}.weight": gate.scores.detach().cpu() for name, gate in zip(gated, gates)}


def mean_open_share(gates):
    """The mean over all matrices of their `open_share`. gates: {name of a module: Gates}. Query, key and value, one
    matrix in `bert.Layer`, count as three."""
    weights = [3 if name.endswith("query_key_value") else 1 for name in gates]
    return sum(n * gate.open_share() for n, gate in zip(weights, gates.values())) / sum(weights)


def draw(scores, sparsity):
    """{name: scores} -> {name: bool mask, False if pruned}: exactly ceil(sparsity N) of the N weights, those with the
    smallest scores over all matrices together. Among equal scores the earlier weight is pruned first."""
    kept = draw_mask(torch.cat([score.flatten() for score in scores.values()])[None], sparsity)[0]
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts)}


if __name__ == "__main__":
    cli.run(main)
