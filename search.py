"""Search the importance coefficients of every attention head and FFN neuron on masked language modelling
(Algorithm 1), with FreeLB as the adversary, until the tickets drawn from them stop changing.

    python search.py                                      embedded MiniLM on BBC News, no network needed
    python search.py --adv-steps 1 --adv-init-mag 0       the ordinary ("vanilla") ticket, no adversary

The command killed at any moment and typed again goes on from the last mini-epoch and ends with the same bytes.
Defaults are those of section 3.5 of the paper where it gives one.
"""

import math
from dataclasses import asdict, dataclass

import filelock
import matplotlib
import torch

import data
import runtime
import tokens
import weights
from bert import Bert
from freelb import freelb
from gates import Coefficients, EarlyStopping, draw_masks
from runtime import BadInput, option


@dataclass
class Options:
    model: str = option(runtime.DEFAULT_MODEL, runtime.MODEL_HELP)
    revision: str = option(
        None, "branch or commit of a model on the hub; bert-base-uncased and roberta-base are pinned"
    )
    corpus: str = option("bbc", "bbc, imdb, wikitext-2-raw-v1 (the paper's), a text file or a folder with .txt files")
    data_revision: str = option(None, "branch or commit of a corpus on the hub, instead of the pinned one")
    output: str = option("runs", "folder for what is made; this script writes below OUTPUT/MODEL")
    seed: int = option(0, "of masking, batches, dropout and perturbations", at_least=0, below=2**63)
    epochs: int = option(1, "at most so many passes over the corpus", at_least=1)
    block: int = option(128, "tokens a training example, [CLS] and [SEP] included", at_least=4)
    batch_size: int = option(32, "examples a step", at_least=1)
    learning_rate: float = option(2e-5, "eta_0, of theta and c alike (Algorithm 1, lines 3 and 4)", above=0)
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
    head_steps: int = option(200, "steps to fit an MLM head where the model comes without one", at_least=1)
    head_learning_rate: float = option(3e-3, "of that head", above=0)
    precision: str = option("auto", "of matrix products; auto: bf16 where it is fast", choices=("auto", "bf16", "fp32"))
    overwrite: bool = option(False, "replace the coefficients of another search in the same folder")


def main():
    options = runtime.parse(Options, __doc__)
    runtime.keep_memory()
    device = runtime.pick_device()
    dtype = runtime.pick_precision(device, options.precision)
    folder, model_sha256 = data.find_model(options.model, options.revision)
    output = runtime.output_folder(options.output, options.model)
    print(runtime.first_line(options.model, device, dtype))
    tokenizer = tokens.Tokenizer(folder)
    blocks = tokens.Blocks(tokenizer, *data.find_corpus(options.corpus, options.data_revision), options.block)
    print(f"corpus {options.corpus}: {len(blocks):,} blocks of {options.block} tokens")

    settings = asdict(options)
    for name in ("output", "overwrite"):
        del settings[name]
    made_by = {
        "script": "search.py",
        "settings": settings | {"precision": runtime.precision_name(dtype)},
        "model_sha256": model_sha256,
        "corpus_sha256": blocks.sha256,
        "versions": runtime.versions(),
    }
    path = output / "coefficients.safetensors"
    if not weights.made_before(path, made_by, options.overwrite):
        search(options, made_by, folder, tokenizer, blocks, output, device, dtype)
    (output / "search.state.safetensors").unlink(missing_ok=True)
    plot(path, output / "search.png")
    report(path, options)


def search(options, made_by, folder, tokenizer, blocks, output, device, dtype):
    """Algorithm 1. Writes coefficients.safetensors into `output`, and search.state.safetensors while it runs."""
    torch.manual_seed(options.seed)
    model = Bert.load(folder, mlm=True)
    config = model.config
    if config.is_pruned:
        raise BadInput(f"{options.model} has narrower layers than its config.json: search the model before pruning")
    if options.block > config.max_length:
        raise BadInput(f"--block {options.block}: {options.model} reads at most {config.max_length} tokens")
    c = Coefficients(config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    draw_masks(*c.gates, options.tau_head, options.tau_ffn)  # ratios that cannot be had are refused now
    for remark in model.remarks:
        print(remark)
    if "mlm_head" in model.initialized:
        fit_mlm_head(options, made_by, model.to(device), tokenizer, blocks, output, dtype)
    model.to(device).train()  # line 1: theta <- theta_0, c <- 1
    c.to(device)
    groups = [*runtime.decay_groups(model, options.weight_decay), {"params": c.parameters(), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)
    adversary = {"steps": options.adv_steps, "lr": options.adv_lr}
    adversary |= {"init_mag": options.adv_init_mag, "max_norm": options.adv_max_norm}

    steps_per_epoch = -(-len(blocks) // options.batch_size)
    steps = options.epochs * steps_per_epoch
    mini_epochs = math.ceil(options.epochs / options.mini_epoch - 1e-9)
    ends = sorted(
        {min(steps, math.ceil((i + 1) * options.mini_epoch * steps_per_epoch - 1e-9)) for i in range(mini_epochs)}
    )
    stopping = EarlyStopping(options.tau_head, options.tau_ffn, options.gamma, options.patience)
    trace = {"trace.head": [], "trace.ffn": [], "trace.distances": [], "trace.loss": []}  # an entry a mini-epoch
    state = output / "search.state.safetensors"
    step = 0
    if weights.made_before(state, made_by, options.overwrite):
        tensors, _ = weights.read_notes(state)
        weights.restore(tensors, optimizer, model=model, c=c)
        trace = {name: list(tensors[name].clone()) for name in trace}
        for head, ffn in zip(trace["trace.head"], trace["trace.ffn"]):
            stopping.update(head, ffn)
        step = ends[len(trace["trace.loss"]) - 1]

    total, counted = torch.zeros((), device=device), 0  # of the mini-epoch's losses; a list would split the heap
    status, order_of, order = "", None, None
    bar = runtime.progress(steps, step, "search")
    while step < steps and not stopping.over:  # line 2
        epoch, batch = divmod(step, steps_per_epoch)
        if order_of != epoch:
            runtime.seed_step(options.seed, 1, epoch)
            order_of, order = epoch, torch.randperm(len(blocks))
        ids = blocks.rows(order[batch * options.batch_size :][: options.batch_size])
        runtime.seed_step(options.seed, 2, step)
        ids, positions, labels = (t.to(device) for t in tokens.mask_tokens(ids, tokenizer))

        def loss_of(delta):
            return model.mlm_loss(model(ids, keep=positions, gates=c.gates, delta=delta), labels)

        with runtime.autocast(device, dtype):  # L_adv of eq. 6
            loss = freelb(loss_of, torch.ones_like(ids), config.hidden_size, **adversary)
        c.penalty(options.lambda_head, options.lambda_ffn).backward()  # R(c) of eq. 5, once a step
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *c.parameters()], options.clip_norm)
        runtime.set_learning_rate(optimizer, options.learning_rate, step, steps, options.warmup)
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
                raise BadInput(f"the search diverged by step {step}: lower --learning-rate {options.learning_rate:g}")
            distances = torch.tensor(stopping.update(head, ffn))
            for series, value in zip(trace.values(), (head, ffn, distances, mean_loss)):
                series.append(value)
            total, counted = torch.zeros_like(total), 0
            stacked = {name: torch.stack(series) for name, series in trace.items()}
            weights.write_safetensors(state, weights.training_state(optimizer, model=model, c=c) | stacked, made_by)
            status = f", distance heads {distances[0]:.3f}, neurons {distances[1]:.3f}, streak {stopping.streak}"
    bar.close()
    final = {"head": trace["trace.head"][-1], "ffn": trace["trace.ffn"][-1]}
    final |= {name: torch.stack(series) for name, series in trace.items()}
    notes = made_by | {"config": asdict(config), "stopped_early": stopping.over, "mini_epochs_at_most": len(ends)}
    weights.write_safetensors(output / "coefficients.safetensors", final, notes)


def fit_mlm_head(options, made_by, model, tokenizer, blocks, output, dtype):
    """Fit an MLM head on the frozen encoder, for a model that is published without one; kept in `output`.

    Its bias starts at the log frequencies of the corpus's tokens, so that the head need not learn them.
    """
    path, head, device = output / "mlm_head.safetensors", model.mlm_head, model.mlm_head.bias.device
    matters = ("seed", "block", "batch_size", "warmup", "head_steps", "head_learning_rate", "precision")
    made_by = made_by | {"settings": {name: made_by["settings"][name] for name in matters}}
    if weights.made_before(path, made_by, overwrite=True):  # it costs a minute, and nobody shares it
        head.load_state_dict(weights.read_safetensors(path)[0])
        return
    print(f"{options.model} comes without an MLM head: fitting one with the encoder frozen, {path} keeps it")
    counts = blocks.frequencies(model.config.vocab_size) + 0.5
    head.bias.data.copy_((counts / counts.sum()).log())
    optimizer = torch.optim.AdamW(head.parameters(), lr=options.head_learning_rate, weight_decay=0.0, fused=True)
    bar = runtime.progress(options.head_steps, description="MLM head")
    for step in range(options.head_steps):
        runtime.seed_step(options.seed, 3, step)
        rows = torch.randint(len(blocks), (min(options.batch_size, len(blocks)),))
        ids, positions, labels = (t.to(device) for t in tokens.mask_tokens(blocks.rows(rows), tokenizer))
        with runtime.autocast(device, dtype):
            with torch.no_grad():
                states = model.eval()(ids, keep=positions)
            loss = model.mlm_loss(states, labels)
        loss.backward(inputs=list(head.parameters()))
        runtime.set_learning_rate(optimizer, options.head_learning_rate, step, options.head_steps, options.warmup)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    bar.close()
    weights.write_safetensors(path, head.state_dict(), made_by)


def find_mlm_head(name, output, model, model_sha256, tokenizer, device):
    """Give `model`, loaded as `name`, the MLM head that a search left in OUTPUT/MODEL, or fit one as a search would."""
    options, output = Options(model=name), runtime.output_folder(output, name)
    path = output / "mlm_head.safetensors"
    with filelock.FileLock(f"{path}.lock"):  # of several processes that want it, one fits
        if path.is_file():
            tensors, notes = weights.read_notes(path)
            if notes.get("model_sha256") == model_sha256:
                model.mlm_head.load_state_dict(tensors)
                return
        blocks = tokens.Blocks(tokenizer, *data.find_corpus(options.corpus), options.block)
        dtype = runtime.pick_precision(device, options.precision)
        settings = asdict(options) | {"precision": runtime.precision_name(dtype)}
        made_by = {"script": "search.py", "settings": settings, "versions": runtime.versions()}
        made_by |= {"model_sha256": model_sha256, "corpus_sha256": blocks.sha256}
        fit_mlm_head(options, made_by, model.to(device), tokenizer, blocks, output, dtype)


def plot(path, picture):
    """The distances of each mini-epoch against gamma, and the loss, as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    tensors, notes = weights.read_notes(path)
    settings, distances = notes["settings"], tensors["trace.distances"].numpy()  # (mini-epochs, 2)
    x = range(1, len(distances) + 1)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 5.2), sharex=True, height_ratios=(3, 1.3))
    above.plot(x, distances[:, 0], marker="o", label=f"heads, tau = {settings['tau_head']:.3g}")
    above.plot(x, distances[:, 1], marker="s", label=f"neurons, tau = {settings['tau_ffn']:.3g}")
    above.axhline(settings["gamma"], color="black", linestyle="--", linewidth=1, label=f"gamma = {settings['gamma']:g}")
    above.set(ylabel="normalized Hamming distance", ylim=(0, None))
    above.set_title(f"Masks from one mini-epoch to the next: {settings['model']} on {settings['corpus']}")
    above.legend()
    below.plot(x, tensors["trace.loss"].numpy(), color="gray", marker=".")
    below.set(xlabel=f"mini-epoch ({settings['mini_epoch']:g} epoch each)", ylabel="loss")
    below.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    with runtime.replacing(picture) as beside:
        figure.savefig(beside, dpi=150, format="png")


def report(path, options):
    """Three lines: what happened, where the result is, what to type next."""
    tensors, notes = weights.read_notes(path)
    ran, most, settings = len(tensors["trace.loss"]), notes["mini_epochs_at_most"], notes["settings"]
    why = f"both distances stayed below gamma = {settings['gamma']:g} {settings['patience']} times in a row"
    if not notes["stopped_early"]:
        why = "that was all of them; the masks had not settled"
    print(f"searched {ran} of {most} mini-epochs: {why}")
    print(f"coefficients: {path}, distances: {path.parent / 'search.png'}")
    print(f"next: python draw.py --task sst2{runtime.flags(options, 'model', 'output')}")


if __name__ == "__main__":
    runtime.run(main)
