"""Algorithm 1: learn the importance coefficients c of every attention head and FFN neuron on masked language modelling,
with FreeLB as the adversary, until the masks drawn from c stop changing.

    python search.py --model minilm                     the bundled MiniLM on part of BBC News, offline
    python search.py --adversary vanilla                the vanilla ticket, without an adversary (Table 3)
    python search.py --objective rt                     with the loss of a task instead of MLM (Table 4)
    python search.py --seeds 10                         ten searches, one after another
    torchrun --nproc-per-node 2 search.py               on two GPUs, each with half of every batch

Interrupted runs resume from the last mini-epoch when rerun; on a CPU, the result is byte-identical. The defaults are
those of section 3.5 of the paper where it gives them, except for the corpus and, without CUDA, the model.
"""

import runtime.start  # noqa: F401 # isort: skip

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import data
from bert import Bert, Config
from checkpoints import huggingface, safetensors
from checkpoints.provenance import Checkpoint, is_up_to_date, software
from checkpoints.runs import SearchRun
from freelb import ADVERSARIES, ADVERSARY_OPTIONS, freelb, initial_delta
from gates import Coefficients, EarlyStopping, draw_masks
from inputs.batches import MaskedBatch
from inputs.examples import load_examples
from inputs.mlm_head import choose_mlm_head, fit_mlm_head
from inputs.tokenizer import Tokenizer
from runtime import cli, distributed, files, optim
from runtime.cli import BadInput, option
from runtime.device import DEFAULT_MODEL, MODEL_HELP, MachineOptions, autocast, precision_name
from sharing.plots import plot_search

SMALL_BATCH = 8  # of bbc-small, so that few tokens make enough steps
SEARCH_ADVERSARIES = tuple(name for name in ADVERSARIES if name != "infobert")  # its second loss is in finetune.py
PRESETS = {  # earlyrobust: the numbers of its authors' scripts (Xi et al. 2022)
    "orticket": {"adversary": "freelb", "lambda_head": 1e-4, "lambda_ffn": 1e-4},
    "earlyrobust": {"adversary": "freelb-earlyrobust", "lambda_head": 1e-5, "lambda_ffn": 2e-4},
}


@dataclass
class Options(data.TaskOptions, MachineOptions):
    model: str = option(DEFAULT_MODEL, MODEL_HELP, group="model")
    revision: str = option(None, "branch or commit of a model on the hub", group="model")
    mlm_head_steps: int = option(None, "steps to fit an MLM head [200, or a published head]", at_least=1, group="model")
    mlm_head_learning_rate: float = option(None, "peak learning rate of these steps [3e-3]", above=0, group="model")
    objective: str = option("mlm", "mlm (on the corpus), or a task (its classification loss)", group="data")
    corpus: str = option(data.CORPORA[0], f"{', '.join(data.CORPORA)}, a text file or a folder", group="data")
    encoding: str = option(None, "encoding of the corpus files [UTF-8]", group="data")
    block: int = option(128, "tokens per example, including [CLS] and [SEP]", at_least=4, group="data")
    preset: str = option("orticket", "sets the adversary and lambda", choices=tuple(PRESETS), group="adversary")
    adversary: str = option(None, "method [the preset's: freelb]", choices=SEARCH_ADVERSARIES, group="adversary")
    adv_steps: int = option(None, "K, passes per step [the adversary's]", at_least=1, group="adversary")
    adv_lr: float = option(None, "size of an ascent step [the adversary's]", at_least=0, group="adversary")
    adv_init_mag: float = option(None, "size of the first delta [the adversary's]", at_least=0, group="adversary")
    adv_max_norm: float = option(None, "norm bound epsilon; 0: none [the adversary's]", at_least=0, group="adversary")
    gamma: float = option(0.1, "threshold of the normalized Hamming distance", above=0, group="early stopping")
    patience: int = option(5, "mini-epochs in a row below gamma", at_least=1, group="early stopping")
    mini_epoch: float = option(0.05, "length in epochs", at_least=1e-4, at_most=1, group="early stopping")
    tau_head: float = option(1 / 6, "pruning ratio of the heads", at_least=0, below=1, group="early stopping")
    tau_ffn: float = option(0.3, "pruning ratio of the neurons", at_least=0, below=1, group="early stopping")
    lambda_head: float = option(None, "lambda_H of eq. 5 [1e-4]", at_least=0, group="optimization")
    lambda_ffn: float = option(None, "lambda_F of eq. 5 [1e-4]", at_least=0, group="optimization")
    epochs: int = option(1, "maximum passes over the corpus", at_least=1, group="optimization")
    batch_size: int = option(None, f"blocks per step [32; bbc-small: {SMALL_BATCH}]", at_least=1, group="optimization")
    learning_rate: float = option(2e-5, "eta_0, of theta and c (AdamW)", above=0, group="optimization")
    learning_rate_c: float = option(None, "learning rate of c [eta_0]; 0: c stays 1", at_least=0, group="optimization")
    warmup: float = option(0.1, "fraction of the steps with warm-up", at_least=0, below=1, group="optimization")
    weight_decay: float = option(0.01, "of AdamW, only on the matrices of theta", at_least=0, group="optimization")
    clip_norm: float = option(1.0, "maximum norm of the gradient", above=0, group="optimization")
    seed: int = option(0, "random seed", at_least=0, below=2**63, group="optimization")
    seeds: int = option(1, "number of searches, from --seed on, one file each", at_least=1, group="output")
    output: str = option("runs", "folder; results go to OUTPUT/MODEL", group="output")
    save_model: str = option(None, "also save theta after the search in this folder, as a model", group="output")
    overwrite: bool = option(False, "replace results; an unfinished run of this command resumes", group="output")

    def __post_init__(self):
        """Options that are not given have the numbers of the preset, of the adversary and of the corpus."""
        is_small = (self.objective, self.corpus) == ("mlm", "bbc-small")
        defaults = PRESETS[self.preset] | {"batch_size": SMALL_BATCH if is_small else 32}
        numbers = ADVERSARIES[self.adversary or defaults["adversary"]]
        for name, value in (defaults | dict(zip(ADVERSARY_OPTIONS, numbers))).items():
            if getattr(self, name) is None:
                setattr(self, name, value)


# options with which a search may resume; --device and --grad-accum-steps change rounding and dropout only
NOT_SETTINGS = ("output", "overwrite", "save_model", "seeds", "device", "grad_accum_steps", "checkpointing", "preset")


def main():
    options = cli.parse(Options, __doc__)
    device, dtype = distributed.start(options)
    output = files.writable(files.model_folder(options.output, options.model))
    with distributed.main_process_first():
        folder, model_sha256 = data.find_model(options.model, options.revision)
        tokenizer, config = Tokenizer(folder), Config.read(folder)
        ones = Coefficients(config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
        draw_masks(*ones.gates, options.tau_head, options.tau_ffn)  # impossible ratios are refused now, not later
        examples, num_labels, examples_sha256 = load_examples(options, tokenizer, config, device)
        head_sha256 = choose_mlm_head(options, model_sha256)
    for seed in range(options.seed, options.seed + options.seeds):
        suffix = "" if num_labels == 0 else f"-{files.task_folder(options.objective)}"
        suffix += f"-seed{seed}" if options.seeds > 1 else ""
        seeded = replace(options, seed=seed)
        settings = {name: value for name, value in asdict(seeded).items() if name not in NOT_SETTINGS}
        provenance = {
            "script": "search.py",
            "settings": settings | {"precision": precision_name(dtype)},
            "model_sha256": model_sha256,
            "config": asdict(config),
            "corpus_sha256": examples_sha256,
            **head_sha256,
            **software(__file__),
        }
        path, state = output / f"coefficients{suffix}.safetensors", output / f"search{suffix}.state.safetensors"
        model_folder = options.save_model and files.writable(Path(f"{options.save_model}{suffix}"))
        results = [path] if model_folder is None else [path, model_folder / "model.safetensors"]

        def is_done():
            # a list: with --overwrite, each of the old files must be removed
            return all([is_up_to_date(result, provenance, options.overwrite) for result in results])

        with distributed.file_lock(state):
            if not distributed.broadcast_from_main(is_done):
                run = SearchRun(seeded, examples, Checkpoint(state, provenance, options.overwrite))
                model, c = starting_point(seeded, folder, num_labels, run, tokenizer, output, dtype)
                stopping = search(seeded, model.to(device), c.to(device), examples, run, dtype)
                if model_folder and distributed.is_main_process():
                    model.save(model_folder, (), provenance)
                    tokenizer.save(model_folder)
                run.write(path, stopping)  # last: if this file exists, the search is complete
            if distributed.is_main_process():
                state.unlink(missing_ok=True)
                report(path, output / f"search{suffix}.png", options)
    distributed.shutdown()


def starting_point(options, folder, num_labels, run, tokenizer, output, dtype):
    """Algorithm 1, line 1: (theta_0 with an MLM head, fitted if it was published without one; c = 1)."""
    torch.manual_seed(options.seed)
    model = Bert.load(folder, mlm=num_labels == 0, num_labels=num_labels)
    config = model.config
    if config.is_pruned:
        raise BadInput(f"{options.model} is pruned: search the full model")
    for line in huggingface.load_report(model):
        print(line)
    model.checkpointing = options.checkpointing
    if "mlm_head" in model.initialized and not run.checkpoint.tensors:
        path, provenance, blocks = output / "mlm_head.safetensors", run.checkpoint.provenance, run.examples
        with distributed.file_lock(path):
            if distributed.is_main_process():
                fit_mlm_head(options.model, provenance, model.to(blocks.device), tokenizer, blocks, path, dtype)
        model.mlm_head.load_state_dict(distributed.broadcast_from_main(model.mlm_head.cpu().state_dict))
    return model, Coefficients(config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)


def search(options, model, c, examples, run, dtype):
    """Algorithm 1. model: theta_0. c: Coefficients, all 1. examples: Blocks or TokenizedSplit. run: SearchRun, which
    logs, saves and resumes. Trains both in place and returns the EarlyStopping object. BadInput if it diverges."""
    model.train()  # Line 1, theta <- theta_0 and c <- 1: see `starting_point`
    parameters = [*model.parameters(), *c.parameters()]
    c_group = {"params": c.parameters(), "weight_decay": 0.0}
    rate_c = options.learning_rate if options.learning_rate_c is None else options.learning_rate_c
    c_group["lr_scale"] = rate_c / options.learning_rate
    optimizer = optim.adamw(model.parameters(), options.learning_rate, options.weight_decay, c_group)
    stopping = EarlyStopping(options.tau_head, options.tau_ffn, options.gamma, options.patience)
    only_last = ADVERSARIES[options.adversary][-1]  # PGD
    step = run.resume(optimizer, model, c, stopping)

    # Lines 2 and 5: repeat until both masks were stable in 5 mini-epochs in a row (section 2.2.2), or for --epochs
    while step < run.steps and not stopping.should_stop:
        indices = run.example_indices(step)
        optim.seed_step(options.seed, 2, step)  # 2: 1 is the order of the examples, 3 the MLM head's fit
        batch, loss = examples.batch(indices), 0.0  # masks 15 % of the tokens, at random in every step
        delta = initial_delta(batch.token_mask, model.config.hidden_size, options.adv_init_mag, options.adv_max_norm)
        for rows in distributed.micro_batches(len(delta), options.grad_accum_steps):  # all rows, or parts of them
            part = batch.rows(rows)
            share = len(part.labels) / max(1, len(batch.labels))

            def loss_of(perturbation):  # L(f(x + delta; theta, c), y) in eq. 6: this part's share of the batch mean
                return objective(model, part, c.gates, perturbation) * share

            strength = options.adv_steps, options.adv_lr, options.adv_max_norm
            with autocast(delta.device, dtype):  # Eq. 6: adds the gradient of L_adv
                loss += freelb(loss_of, delta[rows], part.token_mask, *strength, only_last=only_last)
        distributed.sum_gradients(parameters)  # over the processes, before R(c), which counts once
        c.penalty(options.lambda_head, options.lambda_ffn).backward()  # Eq. 5, R(c): .grad is now that of eq. 7
        torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)  # c with theta, as in EarlyRobust's scripts
        optim.set_learning_rate(optimizer, options.learning_rate, step, run.steps, options.warmup)
        optimizer.step()  # Lines 3 and 4, by AdamW and at once: both gradients are taken at the old theta
        optimizer.zero_grad()
        step += 1
        run.log(loss)
        if step in run.mini_epoch_ends:  # a mini-epoch is 0.05 epoch
            distances = stopping.update(*c.scores)
            run.end_mini_epoch(optimizer, model, c, distances)
    return stopping  # Line 6: return c, which was trained in place; SearchRun.write saves it


def objective(model, batch, gates, delta):
    """The loss L of eq. 6: of masked language modelling, or of classification on a task (Table 4)."""
    if isinstance(batch, MaskedBatch):
        states = model(batch.ids, positions=batch.positions, gates=gates, delta=delta)  # (masked positions, d)
        return model.mlm_loss(states, batch.labels)
    return model.class_loss(*batch, gates=gates, delta=delta)


def report(path, plot_path, options):
    """Plot the search, and print what happened, where the result is and what to run next."""
    trace, metadata = safetensors.read_with_metadata(path)
    settings = metadata["settings"]
    plot_search(trace, settings, plot_path)
    reason = f"both distances stayed below gamma = {settings['gamma']:g} for {settings['patience']} mini-epochs"
    if not metadata["stopped_early"]:
        reason = "stopped by --epochs before the masks were stable"
    print(f"searched {len(trace['trace.loss'])} of {metadata['mini_epochs_at_most']} mini-epochs: {reason}")
    print(f"coefficients: {path}, distances: {plot_path}")
    coefficients = "" if path.stem == "coefficients" else f" --coefficients {shlex.quote(str(path))}"
    task = "rt" if options.objective == "mlm" else shlex.quote(options.objective)
    print(f"next: python draw.py --task {task}{cli.flags(options, 'model', 'output')}{coefficients}")


if __name__ == "__main__":
    cli.run(main)
