"""What the two training loops, search.py's and finetune.py's, log, save and resume from."""

import math
import time
from dataclasses import asdict
from pathlib import Path

import torch

from checkpoints import safetensors
from checkpoints.provenance import Checkpoint, load_module, read_made_by, read_result, write_result
from freelb import ADVERSARIES, ADVERSARY_OPTIONS
from runtime import cli, distributed, optim
from runtime.cli import BadInput
from runtime.device import faster_ways, peak_memory


class SearchRun:
    """The log and the checkpoints of Algorithm 1 (search.py), and the order of its examples.

    trace: {name: [a tensor per mini-epoch]}: c_H, c_F, the two distances, the mean loss.
    """

    def __init__(self, options, examples, checkpoint=None):
        self.options, self.examples, self.checkpoint = options, examples, checkpoint or Checkpoint()
        self.steps_per_epoch = math.ceil(len(examples) / options.batch_size)
        self.steps = options.epochs * self.steps_per_epoch
        # A mini-epoch ends at the first step at or after each multiple of 0.05 epochs. 1e-9: 0.05 is not exact
        length = options.mini_epoch * self.steps_per_epoch  # in steps, not always an integer
        count = math.ceil(options.epochs / options.mini_epoch - 1e-9)
        ends = [math.ceil(number * length - 1e-9) for number in range(1, count + 1)]
        self.mini_epoch_ends = sorted({min(self.steps, end) for end in ends})
        self.trace = {name: [] for name in ("trace.head", "trace.ffn", "trace.distances", "trace.loss")}
        self.epoch, self.order, self.status = None, None, ""
        self.seconds = self.checkpoint.metadata.get("seconds", 0.0)

    def resume(self, optimizer, model, c, stopping):
        """Load the checkpoint, if there is one. Returns the number of steps done."""
        saved, step = self.checkpoint.load(optimizer, model=model, c=c), 0
        if saved:
            self.trace = {name: list(saved[name]) for name in self.trace}
            for head, ffn in zip(self.trace["trace.head"], self.trace["trace.ffn"]):
                stopping.update(head, ffn)
            step = self.mini_epoch_ends[len(self.trace["trace.loss"]) - 1]
        self.total, self.count = torch.zeros((), device=c.head.device), 0
        faster = faster_ways(c.head.device, "a shorter --corpus", checkpointing=self.options.checkpointing)
        self.bar = cli.progress(self.steps, step, "search", parts=len(self.mini_epoch_ends), faster=faster)
        self.start = time.perf_counter()
        return step

    def example_indices(self, step):
        """The indices of the examples of a step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = self.examples.epoch(self.options.batch_size, self.options.seed, epoch)
        return self.order[number]

    def log(self, loss):
        self.total += loss
        self.count += 1
        self.bar.update()
        # with several processes, `loss` is this one's part of the mean
        self.bar.set_postfix_str(lambda: f"loss {loss * distributed.WORLD:.3f}{self.status}", refresh=False)

    def end_mini_epoch(self, optimizer, model, c, distances):
        """Add to the trace and save a checkpoint. Raises BadInput if the search has diverged."""
        mean_loss = (distributed.all_reduce_sum(self.total) / self.count).cpu()
        head, ffn = c.scores
        if not all(torch.isfinite(values).all() for values in (head, ffn, mean_loss)):
            rates = cli.flags(self.options, "learning_rate_c") or f" --learning-rate {self.options.learning_rate:g}"
            raise BadInput(f"the search diverged in mini-epoch {len(self.trace['trace.loss']) + 1}: lower{rates}")
        for values, value in zip(self.trace.values(), (head, ffn, torch.tensor(distances), mean_loss)):
            values.append(value)
        self.total, self.count = torch.zeros_like(self.total), 0
        self.seconds, self.start = self.seconds + time.perf_counter() - self.start, time.perf_counter()
        self.checkpoint.save(optimizer, {"model": model, "c": c}, self.result(), {"seconds": self.seconds})
        self.status = f", distance heads {distances[0]:.3f}, neurons {distances[1]:.3f}"
        self.bar.set_postfix_str(f"loss {mean_loss:.3f}{self.status}")

    def result(self):
        """{name: tensor}: the trace, stacked over the mini-epochs."""
        return {name: torch.stack(values) for name, values in self.trace.items()}

    def write(self, path, stopping):
        """Write the coefficients, the result of Algorithm 1, and the cost of the search to a JSON file beside them."""
        self.bar.close()
        if distributed.is_main_process():
            result = self.result()
            final = {"head": result["trace.head"][-1], "ffn": result["trace.ffn"][-1]}
            ended = {"stopped_early": stopping.should_stop, "mini_epochs_at_most": len(self.mini_epoch_ends)}
            cost = {"seconds": self.seconds, "peak_memory": peak_memory(self.total.device)}
            name = path.name.replace("coefficients", "search", 1)
            write_result(path.with_name(name).with_suffix(".json"), self.checkpoint.provenance | cost)
            safetensors.write_safetensors(path, final | result, self.checkpoint.provenance | ended)


def effective_settings(options, not_settings):
    """What fine-tuning depends on: the options and the adversary's defaults, except options that the method ignores."""
    settings = {name: value for name, value in asdict(options).items() if name not in not_settings}
    settings["ticket"] = Path(options.ticket).name  # its content is identified by its sha256
    defaults = dict(zip(ADVERSARY_OPTIONS, ADVERSARIES[options.method]))
    defaults |= {name: getattr(type(options), name) for name in ("alpha", "beta")}
    ignored = {"vanilla": tuple(defaults), "infobert": ()}.get(options.method, ("alpha", "beta"))
    for name, default in defaults.items():
        if name in ignored and settings[name] != getattr(type(options), name):
            print(f"--{name.replace('_', '-')} {settings[name]} has no effect with --method {options.method}")
        if name in ignored or settings[name] is None:
            settings[name] = default
    return settings


class FinetuneRun:
    """The log and the checkpoints of fine-tuning (finetune.py), and the model of the best epoch.

    adversary: like an entry of ADVERSARIES. scores: the held-out accuracy of every epoch. memory: peak, in bytes.
    """

    def __init__(self, options, split, folder, provenance):
        self.options, self.split, self.folder = options, split, folder
        self.checkpoint = Checkpoint(folder / "finetune.state.safetensors", provenance, options.overwrite)
        saved = self.checkpoint.metadata
        self.scores, self.seconds = saved.get("scores", []), saved.get("seconds", 0.0)
        self.memory, self.status = saved.get("peak_memory", 0), ""
        settings = provenance["settings"]
        self.adversary = [*(settings[name] for name in ADVERSARY_OPTIONS), ADVERSARIES[options.method][-1]]
        self.steps_per_epoch = math.ceil(len(split) / options.batch_size)
        self.steps = options.epochs * self.steps_per_epoch

    def resume(self, optimizer, modules):
        """Load the checkpoint, if there is one. Returns the number of epochs done."""
        self.checkpoint.load(optimizer, **modules)
        ways, checkpointing = "fewer --train-rows or --epochs", self.options.checkpointing
        faster = faster_ways(self.split.device, ways, checkpointing=checkpointing)
        done = len(self.scores) * self.steps_per_epoch
        self.bar = cli.progress(self.steps, done, "fine-tune", parts=self.options.epochs, faster=faster)
        return len(self.scores)

    def batches(self, epoch):
        """Yield (step, batch) for all training rows, in an order that depends on the seed and the epoch alone."""
        start, self.total = time.perf_counter(), torch.zeros((), device=self.split.device)
        order = self.split.epoch(self.options.batch_size, self.options.seed, epoch)
        yield from enumerate(map(self.split.batch, order), epoch * self.steps_per_epoch)
        self.seconds += time.perf_counter() - start

    def log(self, loss):
        self.total += loss
        self.bar.update()
        # with several processes, `loss` is this one's part of the mean
        self.bar.set_postfix_str(lambda: f"loss {loss * distributed.WORLD:.3f}{self.status}", refresh=False)

    def best_path(self):
        """The weights of the best epoch. Each epoch has its own file, so that a kill cannot mix two epochs."""
        return self.folder / f"epoch{self.best_epoch}.state.safetensors"

    @property
    def best_epoch(self):
        return self.scores.index(max(self.scores)) + 1

    def end_epoch(self, optimizer, modules, score):
        """Save a checkpoint, and the model if its score is the best. Raises BadInput if training has diverged."""
        mean_loss = distributed.all_reduce_sum(self.total).item() / self.steps_per_epoch
        if not math.isfinite(mean_loss):
            epoch, rate = len(self.scores) + 1, self.options.learning_rate
            raise BadInput(f"training diverged in epoch {epoch}: lower --learning-rate {rate:g}")
        self.scores.append(score)
        self.memory = max(self.memory, peak_memory(self.split.device))
        if distributed.is_main_process():
            if self.best_epoch == len(self.scores):
                state = modules["model"].state_dict()
                safetensors.write_safetensors(self.best_path(), state, self.checkpoint.unfinished)
            progress = {"scores": self.scores, "seconds": self.seconds, "peak_memory": self.memory}
            self.checkpoint.save(optimizer, modules, metadata=progress)
            for older in set(self.folder.glob("epoch*.state.safetensors")) - {self.best_path()}:
                older.unlink()
        self.status = f", held-out accuracy {score:.2%}"
        self.bar.set_postfix_str(f"loss {mean_loss:.3f}{self.status}")

    def load_best(self, model):
        """Load the weights of the best epoch into the model."""
        self.bar.close()
        path, made_by = self.best_path(), self.checkpoint.unfinished
        load_module(model, distributed.broadcast_from_main(lambda: dict(read_made_by(path, made_by)[0])), path)

    def metrics(self):
        """The held-out accuracy and the cost of the run."""
        return {
            "best_epoch": self.best_epoch,
            "validation_accuracy": max(self.scores),
            "validation_accuracy_by_epoch": self.scores,
            "seconds": self.seconds,
            "tokens_per_second": self.options.epochs * len(self.split.ids) / self.seconds,
            "peak_memory": max(self.memory, peak_memory(self.split.device)),
        }

    def decay(self):
        """The factor by which AdamW's weight decay has shrunk an embedding without gradients by the best epoch."""
        options = self.options
        steps = range(self.best_epoch * self.steps_per_epoch)
        rates = (optim.learning_rate(options.learning_rate, step, self.steps, options.warmup) for step in steps)
        return math.prod(1 - rate * options.weight_decay for rate in rates)


def read_metrics(folder):
    """The content of metrics.json. Raises BadInput if model.safetensors is from another run."""
    path, model = folder / "metrics.json", folder / "model.safetensors"
    metrics, (_, provenance) = read_result(path), safetensors.read_with_metadata(model, "finetune.py")
    if any(metrics.get(key) != value for key, value in provenance.items()):
        raise BadInput(f"{path} and model.safetensors are from different runs: fine-tune again with --overwrite")
    return metrics
