"""Search the importance coefficients of every attention head and FFN neuron on masked language modelling
(Algorithm 1), with FreeLB as the adversary, until the tickets drawn from them stop changing.

    python search.py                                      embedded MiniLM on BBC News, no network needed
    python search.py --adv-steps 1 --adv-init-mag 0       the ordinary ("vanilla") ticket, no adversary (Table 3)
    python search.py --objective rt                          on a task's loss instead of MLM's (Table 4)
    python search.py --seeds 10                           ten searches, one after another
    torchrun --nproc-per-node 2 search.py                 on two GPUs, each taking half of every batch

The command killed at any moment and typed again goes on from the last mini-epoch and ends with the same bytes.
Defaults are those of the paper's section 3.5 where it gives one, but for the corpus and, without CUDA, the model.
"""

import math
import shlex
from dataclasses import asdict, dataclass, replace

import filelock
import numpy as np
import torch

import data
from bert import Bert, Config
from checkpoints import huggingface, safetensors
from checkpoints.provenance import is_up_to_date, load_checkpoint, restore_state, training_state, versions
from freelb import freelb
from gates import Coefficients, EarlyStopping, draw_masks
from inputs.batches import Blocks, TokenizedSplit, length_sorted_batches, mask_tokens, rows_sha256
from inputs.tokenizer import Tokenizer
from runtime import cli, distributed, files, optim
from runtime.cli import BadInput, option
from runtime.cpu import keep_memory
from runtime.device import DEFAULT_MODEL, MODEL_HELP, autocast, pick_device, pick_precision, precision_name, run_banner


@dataclass
class Options:
    model: str = option(DEFAULT_MODEL, MODEL_HELP)
    revision: str = option(
        None, "branch or commit of a model on the hub; bert-base-uncased and roberta-base are pinned"
    )
    objective: str = option("mlm", "mlm on the corpus; or a task, whose own loss is then searched on")
    text_columns: tuple = option(("text",), "of a source of one's own: the column with the text, or two for pairs")
    label_column: str = option("label", "of a source of one's own")
    corpus: str = option(
        "bbc", "of the source mlm: bbc, imdb, wikitext-2-raw-v1 (the paper's), a text file or a folder with .txt files"
    )
    data_revision: str = option(None, "branch or commit of a corpus on the hub, instead of the pinned one")
    output: str = option("runs", "folder for what is made; this script writes below OUTPUT/MODEL")
    seed: int = option(0, "of masking, batches, dropout and perturbations", at_least=0, below=2**63)
    seeds: int = option(1, "searches, from --seed on; the files' names then end in the seed", at_least=1)
    epochs: int = option(1, "at most so many passes over the corpus", at_least=1)
    block: int = option(128, "tokens of a corpus's examples, [CLS] and [SEP] included", at_least=4)
    batch_size: int = option(32, "examples a step", at_least=1)
    learning_rate: float = option(2e-5, "eta_0, of theta and c alike (Algorithm 1, lines 3 and 4)", above=0)
    learning_rate_c: float = option(None, "of c alone, instead of eta_0", above=0)
    warmup: float = option(0.1, "share of all steps in which the learning rate rises", at_least=0, below=1)
    weight_decay: float = option(0.01, "AdamW's, on theta's matrices; never on c", at_least=0)
    clip_norm: float = option(1.0, "largest norm of the whole gradient", above=0)
    adv_steps: int = option(3, "K, FreeLB's ascent steps; 1: none", at_least=1)
    adv_lr: float = option(0.03, "size of an ascent step", at_least=0)
    adv_init_mag: float = option(0.05, "magnitude of the initial perturbation", at_least=0)
    adv_max_norm: float = option(0.2, "epsilon of eq. 6, an L2 norm per example; 0: no bound", at_least=0)
    lambda_head: float = option(1e-4, "lambda_H of eq. 5", at_least=0)
    lambda_ffn: float = option(1e-4, "lambda_F of eq. 5", at_least=0)
    tau_head: float = option(1 / 6, "pruning ratio of the heads in the masks that are compared", at_least=0, below=1)
    tau_ffn: float = option(0.3, "pruning ratio of the neurons in the masks that are compared", at_least=0, below=1)
    mini_epoch: float = option(0.05, "epochs between two comparisons of the masks", at_least=1e-4, at_most=1)
    gamma: float = option(0.1, "normalized Hamming distance below which masks count as unchanged", above=0)
    patience: int = option(5, "mini-epochs in a row below gamma that end the search", at_least=1)
    mlm_head_steps: int = option(200, "steps to fit an MLM head where the model comes without one", at_least=1)
    mlm_head_learning_rate: float = option(3e-3, "of that head", above=0)
    grad_accum_steps: int = option(1, "parts of a step, one after another, where memory is short", at_least=1)
    checkpointing: bool = option(
        False, "compute activations twice instead of keeping them: less memory, a third more work"
    )
    precision: str = option("auto", "of matrix products; auto: bf16 where it is fast", choices=("auto", "bf16", "fp32"))
    overwrite: bool = option(False, "replace the coefficients of another search in the same folder")


NOT_SETTINGS = ("output", "overwrite", "seeds", "grad_accum_steps", "checkpointing")  # a search may go on with others


def main():
    options = cli.parse(Options, __doc__)
    keep_memory()
    device = pick_device()
    distributed.init_distributed(device)
    dtype = pick_precision(device, options.precision)
    columns = cli.flags(options, "text_columns", "label_column")
    if options.objective == "mlm" and columns:
        raise BadInput(f"{columns.strip()} is of a --objective of one's own: a corpus has no columns")
    output = files.output_folder(options.output, options.model)
    with distributed.main_process_first():
        folder, model_sha256 = data.find_model(options.model, options.revision)
        print(run_banner(options.model, device, dtype))
        tokenizer = Tokenizer(folder)
        config = Config.read(folder)
        c = Coefficients(config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
        draw_masks(*c.gates, options.tau_head, options.tau_ffn)  # ratios that cannot be had are refused now
        source = (MLM if options.objective == "mlm" else Classification)(options, tokenizer, config, device)
    print(source.description)
    for seed in range(options.seed, options.seed + options.seeds):
        name = "" if options.objective == "mlm" else f"-{files.task_folder(options.objective)}"
        name += f"-seed{seed}" if options.seeds > 1 else ""
        of_seed = replace(options, seed=seed)
        settings = {key: value for key, value in asdict(of_seed).items() if key not in NOT_SETTINGS}
        provenance = {
            "script": "search.py",
            "settings": settings | {"precision": precision_name(dtype)},
            "model_sha256": model_sha256,
            "config": asdict(config),
            "corpus_sha256": source.sha256,
            "versions": versions(),
        }
        path, state = output / f"coefficients{name}.safetensors", output / f"search{name}.state.safetensors"
        with distributed.file_lock(state):
            if not distributed.broadcast_from_main(lambda: is_up_to_date(path, provenance, options.overwrite)):
                search(of_seed, provenance, folder, tokenizer, source, path, state, device, dtype)
            if distributed.is_main_process():
                state.unlink(missing_ok=True)
                plot(path, output / f"search{name}.png")
                report(path, output / f"search{name}.png", options)
    distributed.shutdown()


class MLM:
    """What is searched on: masked language modelling on blocks of a corpus. `steps` are those of an epoch."""

    def __init__(self, options, tokenizer, config, device):
        if options.block > config.max_length:
            raise BadInput(f"--block {options.block}: {options.model} reads at most {config.max_length} tokens")
        corpus, self.device = data.find_corpus(options.corpus, options.data_revision), device
        self.blocks = Blocks(tokenizer, *corpus, options.block)
        self.tokenizer, self.sha256, self.num_labels = tokenizer, self.blocks.sha256, 0
        self.steps = -(-len(self.blocks) // options.batch_size)
        self.description = f"corpus {options.corpus}: {len(self.blocks):,} blocks of {options.block} tokens"

    def epoch(self, seed, epoch, batch_size):
        """The epoch's batches, as numbers of blocks."""
        optim.seed_step(seed, 1, epoch)
        return torch.randperm(len(self.blocks)).split(batch_size)

    def batch(self, chosen, model, c):
        """(mask of its tokens (B, T), what processes.gradients calls loss_for); masks words anew at every call."""
        ids, positions, labels = mask_tokens(self.blocks.rows(chosen), self.tokenizer)

        def loss_for(rows):
            first, end = (torch.searchsorted(positions, row * ids.shape[1]).item() for row in (rows.start, rows.stop))
            keep = positions[first:end] - rows.start * ids.shape[1]  # of the B T tokens of these rows
            part = [t.to(self.device) for t in (ids[rows], keep, labels[first:end])]

            def loss_of(delta):
                loss = model.mlm_loss(model(part[0], positions=part[1], gates=c.gates, delta=delta), part[2])
                return loss * ((end - first) / max(1, len(labels)))

            return loss_of, None

        return torch.ones(ids.shape, device=self.device), loss_for


class Classification:
    """Or a task (Table 4): its training rows, with a classifier, newly initialized where the model has none for it."""

    def __init__(self, options, tokenizer, config, device):
        task = data.find_task(options.objective, tuple(options.text_columns), options.label_column)
        rows = task.load(options.data_revision)["train"]
        length = min(task.max_length, config.max_length)
        self.rows = TokenizedSplit(tokenizer, rows, length, device)
        self.num_labels, self.sha256 = len(task.labels), rows_sha256(tokenizer, length, rows)
        self.steps = -(-len(rows) // options.batch_size)
        self.description = f"task {options.objective}: {len(rows):,} training rows"

    def epoch(self, seed, epoch, batch_size):
        generator = np.random.Generator(np.random.PCG64([seed, epoch]))
        return [torch.from_numpy(chosen) for chosen in length_sorted_batches(self.rows.lengths, batch_size, generator)]

    def batch(self, chosen, model, c):
        batch = self.rows.batch(chosen)

        def loss_for(rows):
            part = batch.rows(rows)
            share = len(part[-1]) / len(chosen)
            return (lambda delta: model.class_loss(*part, c.gates, delta) * share), None

        return batch.token_mask, loss_for


def search(options, provenance, folder, tokenizer, source, path, state, device, dtype):
    """Algorithm 1. Writes the coefficients to `path`, and to `state` how far it is."""
    tensors = distributed.broadcast_from_main(lambda: load_checkpoint(state, provenance, options.overwrite))[0]
    torch.manual_seed(options.seed)
    model = Bert.load(folder, mlm=not source.num_labels, num_labels=source.num_labels)
    config = model.config
    if config.is_pruned:
        raise BadInput(f"{options.model} has narrower layers than its config.json: search the model before pruning")
    c = Coefficients(config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    for remark in huggingface.load_report(model):
        print(remark)
    if (
        "mlm_head" in model.initialized and not tensors and distributed.is_main_process()
    ):  # the others get it with the rest of theta
        head_path = path.parent / "mlm_head.safetensors"
        with distributed.file_lock(head_path):
            fit_mlm_head(options, provenance, model.to(device), tokenizer, source.blocks, head_path, dtype)
    model.checkpointing = options.checkpointing
    model.to(device).train()  # line 1: theta <- theta_0, c <- 1
    c.to(device)
    of_c = (options.learning_rate_c or options.learning_rate) / options.learning_rate
    groups = optim.decay_groups(model, options.weight_decay)
    groups.append({"params": c.parameters(), "weight_decay": 0.0, "lr_scale": of_c})
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)
    trained = distributed.together(model=model, c=c)
    adversary = {"accumulate": options.grad_accum_steps, "steps": options.adv_steps, "lr": options.adv_lr}
    adversary |= {"init_mag": options.adv_init_mag, "max_norm": options.adv_max_norm}

    steps_per_epoch = source.steps
    steps = options.epochs * steps_per_epoch
    mini_epochs = math.ceil(options.epochs / options.mini_epoch - 1e-9)
    ends = sorted(
        {min(steps, math.ceil((i + 1) * options.mini_epoch * steps_per_epoch - 1e-9)) for i in range(mini_epochs)}
    )
    stopping = EarlyStopping(options.tau_head, options.tau_ffn, options.gamma, options.patience)
    trace = {"trace.head": [], "trace.ffn": [], "trace.distances": [], "trace.loss": []}  # an entry a mini-epoch
    step = 0
    if tensors:
        restore_state(tensors, optimizer, model=model, c=c)
        trace = {name: list(tensors[name].clone()) for name in trace}
        for head, ffn in zip(trace["trace.head"], trace["trace.ffn"]):
            stopping.update(head, ffn)
        step = ends[len(trace["trace.loss"]) - 1]

    total, counted = torch.zeros((), device=device), 0  # of the mini-epoch's losses; a list would fragment the memory
    status, order_of, order = "", None, None
    bar = cli.progress(steps, step, "search")
    while step < steps and not stopping.should_stop:  # line 2
        epoch, batch = divmod(step, steps_per_epoch)
        if order_of != epoch:
            order_of, order = epoch, source.epoch(options.seed, epoch, options.batch_size)
        optim.seed_step(options.seed, 2, step)
        present, loss_for = source.batch(order[batch], model, c)
        with autocast(device, dtype):  # L_adv of eq. 6
            loss = distributed.gradients(trained, freelb, loss_for, present, config.hidden_size, **adversary)
        c.penalty(options.lambda_head, options.lambda_ffn).backward()  # R(c) of eq. 5, once a step
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *c.parameters()], options.clip_norm)
        optim.set_learning_rate(optimizer, options.learning_rate, step, steps, options.warmup)
        optimizer.step()  # lines 3 and 4
        optimizer.zero_grad()
        step, counted = step + 1, counted + 1
        total += loss
        if not bar.disable:
            bar.set_postfix_str(f"loss {loss:.3f}{status}", refresh=False)
        bar.update()
        if step in ends:
            head, ffn = c.head.detach().cpu().clone(), c.ffn.detach().cpu().clone()
            mean_loss = (total / counted).cpu()
            if not all(torch.isfinite(number).all() for number in (head, ffn, mean_loss)):
                rates = cli.flags(options, "learning_rate_c") or f" --learning-rate {options.learning_rate:g}"
                raise BadInput(f"the search diverged by step {step}: lower{rates}")
            distances = torch.tensor(stopping.update(head, ffn))
            for series, value in zip(trace.values(), (head, ffn, distances, mean_loss)):
                series.append(value)
            total, counted = torch.zeros_like(total), 0
            stacked = {name: torch.stack(series) for name, series in trace.items()}
            if distributed.is_main_process():
                tensors = training_state(optimizer, model=model, c=c) | stacked
                safetensors.write_safetensors(state, tensors, provenance)
            status = f", distance heads {distances[0]:.3f}, neurons {distances[1]:.3f}, streak {stopping.streak}"
    bar.close()
    if not distributed.is_main_process():
        return
    final = {"head": trace["trace.head"][-1], "ffn": trace["trace.ffn"][-1]}
    final |= {name: torch.stack(series) for name, series in trace.items()}
    metadata = provenance | {"stopped_early": stopping.should_stop, "mini_epochs_at_most": len(ends)}
    safetensors.write_safetensors(path, final, metadata)


def fit_mlm_head(options, provenance, model, tokenizer, blocks, path, dtype):
    """Fit an MLM head on the frozen encoder, for a model that is published without one, and keep it at `path`.

    Its bias starts at the log frequencies of the corpus's tokens, so that the head need not learn them.
    """
    head, device = model.mlm_head, model.mlm_head.bias.device
    matters = ("seed", "block", "batch_size", "warmup", "mlm_head_steps", "mlm_head_learning_rate", "precision")
    provenance = provenance | {"settings": {name: provenance["settings"][name] for name in matters}}
    if is_up_to_date(path, provenance, overwrite=True):  # another takes a minute, and attack.py says which it used
        head.load_state_dict(safetensors.read_safetensors(path)[0])
        return
    print(f"{options.model} comes without an MLM head: fitting one with the encoder frozen, {path} keeps it")
    counts = blocks.frequencies(model.config.vocab_size) + 0.5
    head.bias.data.copy_((counts / counts.sum()).log())
    optimizer = torch.optim.AdamW(head.parameters(), lr=options.mlm_head_learning_rate, weight_decay=0.0, fused=True)
    bar = cli.progress(options.mlm_head_steps, description="MLM head")
    for step in range(options.mlm_head_steps):
        optim.seed_step(options.seed, 3, step)
        rows = torch.randint(len(blocks), (min(options.batch_size, len(blocks)),))
        ids, positions, labels = (t.to(device) for t in mask_tokens(blocks.rows(rows), tokenizer))
        with autocast(device, dtype):
            with torch.no_grad():
                states = model.eval()(ids, positions=positions)
            loss = model.mlm_loss(states, labels)
        loss.backward(inputs=list(head.parameters()))
        optim.set_learning_rate(optimizer, options.mlm_head_learning_rate, step, options.mlm_head_steps, options.warmup)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    bar.close()
    safetensors.write_safetensors(path, head.state_dict(), provenance)


def find_mlm_head(name, output, model, model_sha256, tokenizer, device):
    """Give `model`, loaded as `name`, the MLM head that a search left in OUTPUT/MODEL, or fit one as a search would.
    Returns the head's notes, how it was fitted."""
    options, output = Options(model=name), files.output_folder(output, name)
    path = output / "mlm_head.safetensors"
    with filelock.FileLock(f"{path}.lock"):  # of several processes that want it, one fits
        if path.is_file():
            tensors, metadata = safetensors.read_with_metadata(path)
            if metadata.get("model_sha256") == model_sha256:
                model.mlm_head.load_state_dict(tensors)
                return metadata
        blocks = Blocks(tokenizer, *data.find_corpus(options.corpus), options.block)
        dtype = pick_precision(device, options.precision)
        settings = asdict(options) | {"precision": precision_name(dtype)}
        provenance = {"script": "search.py", "settings": settings, "model_sha256": model_sha256}
        provenance |= {"config": asdict(tokenizer.config), "corpus_sha256": blocks.sha256, "versions": versions()}
        torch.manual_seed(options.seed)
        model.mlm_head.apply(model.initialize)
        fit_mlm_head(options, provenance, model.to(device), tokenizer, blocks, path, dtype)
    return safetensors.read_with_metadata(path)[1]


def plot(path, picture):
    """The distances of each mini-epoch against gamma, and the loss, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tensors, metadata = safetensors.read_with_metadata(path)
    settings, distances = metadata["settings"], tensors["trace.distances"].numpy()  # (mini-epochs, 2)
    x = range(1, len(distances) + 1)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 5.2), sharex=True, height_ratios=(3, 1.3))
    above.plot(x, distances[:, 0], marker="o", label=f"heads, tau = {settings['tau_head']:.3g}")
    above.plot(x, distances[:, 1], marker="s", label=f"neurons, tau = {settings['tau_ffn']:.3g}")
    above.axhline(settings["gamma"], color="black", linestyle="--", linewidth=1, label=f"gamma = {settings['gamma']:g}")
    above.set(ylabel="normalized Hamming distance", ylim=(0, None))
    on = settings["corpus"] if settings["objective"] == "mlm" else settings["objective"]
    above.set_title(f"Masks from one mini-epoch to the next: {settings['model']} on {on}", parse_math=False)
    above.legend()
    below.plot(x, tensors["trace.loss"].numpy(), color="gray", marker=".")
    below.set(xlabel=f"mini-epoch ({settings['mini_epoch']:g} epoch each)", ylabel="loss")
    below.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    with files.atomic_write(picture) as tmp_path:
        figure.savefig(tmp_path, dpi=150, format="png")
    pyplot.close(figure)


def report(path, picture, options):
    """Three lines: what happened, where the result is, what to type next."""
    tensors, metadata = safetensors.read_with_metadata(path)
    ran, most, settings = len(tensors["trace.loss"]), metadata["mini_epochs_at_most"], metadata["settings"]
    why = f"both distances stayed below gamma = {settings['gamma']:g} {settings['patience']} times in a row"
    if not metadata["stopped_early"]:
        why = "that was all of them; the masks had not settled"
    print(f"searched {ran} of {most} mini-epochs: {why}")
    print(f"coefficients: {path}, distances: {picture}")
    given = "" if path.stem == "coefficients" else f" --coefficients {shlex.quote(str(path))}"
    task = "sst2" if options.objective == "mlm" else shlex.quote(options.objective)
    print(f"next: python draw.py --task {task}{cli.flags(options, 'model', 'output')}{given}")


if __name__ == "__main__":
    cli.run(main)
