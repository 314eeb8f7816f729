"""Everything that depends on a GPU, checked and timed in at most 9 minutes, without a network.

    python -m benchmarks.gpu_check --weights FOLDER                    FOLDER: MiniLM with config.json and vocabulary
    python -m benchmarks.gpu_check --weights FOLDER --corpus bbc.txt   searches that text instead of random words
    python -m benchmarks.gpu_check --small --device cpu                the same code on a tiny model

Needs PyTorch, numpy, tokenizers and transformers. Each part is a separate process: a failure does not end the
others. The parts that fail fastest come first. Writes gpu.json and gpu.md into --results, after each part.
"""

import contextlib
import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from bert import Bert, Config
from checkpoints import safetensors
from checkpoints.provenance import ROOT
from checkpoints.runs import read_metrics
from freelb import freelb
from gates import draw_masks
from inputs.tokenizer import Tokenizer
from runtime import cli, files
from runtime.cli import BadInput, option
from runtime.device import autocast, describe_machine, pick_device

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 128}
STUB = "__version__ = '0'\n\n\nclass Missing(Exception):\n    pass\n\n\ndef __getattr__(name):\n    return Missing\n"
LIMIT = 180  # seconds per part: a part that hangs must leave time for the others
LIMITS = {"compiled finetune": 240}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class Options:
    weights: str = option(None, "folder of MiniLM; without it a model with random weights")
    corpus: str = option(None, "text file for the search; without it random words")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto: CUDA, then MPS, then CPU")
    minutes: float = option(9, "parts that would begin later are left out", above=0)
    small: bool = option(False, "small sizes, for a test on a CPU")
    parts: tuple = option((), "some of the parts instead of all")
    results: str = option("benchmarks/results", "folder for gpu.json and gpu.md")
    worker: str = option(None, "internal: a folder; runs the first of --parts there")


def main():
    options, start = cli.parse(Options, __doc__), time.monotonic()
    if unknown := set(options.parts) - set(PARTS):
        raise BadInput(f"--parts {' '.join(unknown)}: give some of {', '.join(PARTS)}")
    if options.worker:
        return PARTS[options.parts[0]](options, Path(options.worker))
    device = pick_device(options.device)
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for package in ("pyarrow", "requests", "urllib3"):  # for data that is not used here
            if importlib.util.find_spec(package) is None:
                for name in ("__init__", "parquet"):
                    files.write_text(Path(folder, "stubs", package, f"{name}.py"), STUB)
        prepare(options, Path(folder))
        for part in options.parts or PARTS:
            left = 60 * options.minutes - (time.monotonic() - start)
            rows += run_part(options, part, folder, left)
            write(options, device, rows, time.monotonic() - start)
    failed = sum(row["verdict"] == "FAILED" for row in rows)
    print(f"{failed} of {len(rows)} results failed; {options.results}/gpu.md")


def write(options, device, rows, seconds):
    """Write gpu.json and gpu.md, without the paths of this machine."""
    given = {name: value for name, value in asdict(options).items() if name not in ("weights", "corpus", "results")}
    results = {"machine": describe_machine(device), "torch": torch.__version__, "options": given, "rows": rows}
    files.write_json(Path(options.results) / "gpu.json", results)
    lines = [f"{describe_machine(device)}, PyTorch {torch.__version__}, {seconds:.0f} s in all.", ""]
    lines += ["| part | what | result | |", "|---|---|---|---|"]
    lines += [f"| {row['part']} | {row['what']} | {row['result']} | {row['verdict']} |" for row in rows]
    files.write_text(Path(options.results) / "gpu.md", "\n".join(lines) + "\n")


def run_part(options, part, folder, left):
    """The rows that a part printed as JSON, and one more if it failed. They are printed as they come."""
    flags = ["--device", options.device, "--worker", folder, "--parts", part, *["--small"] * options.small]
    for name in ("corpus", "weights"):
        flags += [] if getattr(options, name) is None else [f"--{name}", os.path.abspath(getattr(options, name))]
    path, start, most, failure = Path(folder) / f"{part}.out", time.monotonic(), LIMITS.get(part, LIMIT), None
    limit = max(1, min(left, most))
    paths = [f"{folder}/stubs", *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "ORTICKET_DEBUG": "1"}
    env |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    with open(path, "w") as out, open(f"{path}.err", "w") as err:
        command = [sys.executable, "-m", "benchmarks.gpu_check", *flags]
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err, start_new_session=True)
        try:
            code = process.wait(limit)
            failure = (f"exit code {code}", "FAILED") if code else None
        except subprocess.TimeoutExpired:
            failure = f"stopped after {limit:.0f} s", "FAILED" if limit == most else "left out"
        finally:
            stop(process)
    lines = path.read_text("utf8", "replace").splitlines()
    rows = [{"part": part, **json.loads(line)} for line in lines if line.startswith('{"what"')]
    if failure:
        log = Path(f"{path}.err").read_text("utf8", "replace").strip().splitlines() or [""]
        row = {"part": part, "what": failure[0], "result": log[-1].replace("|", "/"), "verdict": failure[1]}
        rows.append(row | {"log": [line.replace(f"{ROOT}{os.sep}", "") for line in log[-30:]]})
    for row in rows:
        print("{part:10} {what:50} {result} {verdict}".format(**row), *row.get("log", []), sep="\n    ", flush=True)
    print(f"{part:10} {time.monotonic() - start:.0f} s", flush=True)
    return rows


def stop(process):
    """End a process and those that it started, which would slow the next part."""
    for number in (signal.SIGTERM, signal.SIGKILL) if os.name == "posix" else ():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            time.sleep(2)  # torchrun ends its own processes on SIGTERM
    process.kill()
    process.wait()


def record(what, result, holds=None):
    """Print a row as JSON. holds: whether the check passed; None: only a figure."""
    verdict = {None: "", True: "ok", False: "FAILED"}[holds]
    print(json.dumps({"what": what, "result": result, "verdict": verdict}), flush=True)


def prepare(options, folder):
    """Write what the parts read: MiniLM, the same without dropout, a model of BERT-base's sizes, corpora, a task."""
    torch.manual_seed(0)
    generator, tokenizer = random.Random(0), None
    words = [a + b + c for a in LETTERS for b in LETTERS for c in "aeiou"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *words]
    sizes = {"num_labels": 2} | (TINY | {"vocab_size": len(vocabulary)} if options.small else {})
    if options.weights:
        minilm, tokenizer = Bert.load(options.weights, num_labels=2).float(), Tokenizer(Path(options.weights))
        words = [word for word in tokenizer.library.get_vocab() if word.isalpha() and word.isascii() and len(word) > 2]
    else:
        minilm = Bert(Config(**sizes))
    config = replace(minilm.config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    still = Bert(config, mlm=True)
    still.load_state_dict(minilm.state_dict(), strict=False)
    base = Bert(replace(Config(**sizes), vocab_size=config.vocab_size), mlm=True)
    for name, model in (("minilm", minilm), ("still", still), ("base", base)):
        model.save(folder / name, ("0", "1"), {})
        if tokenizer:
            tokenizer.save(folder / name)
        else:
            (folder / name / "vocab.txt").write_text("\n".join(vocabulary), "utf8")

    def text(length):
        return " ".join(generator.choices(words, k=length))

    count = 500 if options.small else 20_000
    lengths = [min(55, max(1, round(generator.lognormvariate(2.03, 0.78)))) for _ in range(count)]  # like SST-2's
    rows = [f"{text(length)},{generator.randrange(2)}" for length in lengths]
    (folder / "task.csv").write_text("\n".join(["text,label", *rows]), "utf8")
    for name, size in (("quick.txt", 80), ("corpus.txt", count // 5)):
        (folder / name).write_text("\n".join(text(100) for _ in range(size)), "utf8")


def check_equal(options, folder):
    """Logits, losses and gradients equal the CPU's, of the full model and of an uneven ticket."""
    device = pick_device(options.device)
    torch.manual_seed(0)
    full = Bert.load(folder / "still", mlm=True)
    shape = full.config.num_hidden_layers, full.config.num_attention_heads, full.config.intermediate_size
    head_mask, ffn_mask = draw_masks(torch.rand(shape[:2]), torch.rand(shape[0], shape[2]), 1 / 6, 0.3)
    head_mask[0], ffn_mask[-1] = torch.arange(shape[1]) == 0, False
    ids, mask = torch.randint(31, full.config.vocab_size, (8, 40)), torch.arange(40) < torch.arange(5, 45, 5)[:, None]
    positions, labels = mask.flatten().nonzero().flatten()[::7], torch.arange(8) // 6
    delta = 0.01 * torch.randn(8, 40, full.config.hidden_size)

    def compute(model, device, dtype, steps):
        """{"loss", "logits" and every gradient} of both heads, on the CPU; steps: K of FreeLB."""
        model = model.with_state(model.config, {name: t.to(device) for name, t in model.state_dict().items()})
        given = [tensor.to(device) for tensor in (ids, mask, positions, labels)]

        def loss_of(delta):
            states = model(given[0], given[1], positions=given[2], delta=delta)
            loss = model.mlm_loss(states, given[0].flatten()[given[2]])
            return loss + model.class_loss(given[0], given[1], None, given[3], delta=delta)

        with autocast(device, dtype):
            logits = model.class_logits(given[0], given[1]).detach()
            loss = freelb(loss_of, delta.to(device), given[1], steps, 0.03, 0.2)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: tensor.float().cpu() for name, tensor in {"loss": loss, "logits": logits, **gradients}.items()}

    cpu = torch.device("cpu")
    for name, model in (("full model", full), ("one head, no neurons", full.pruned(head_mask, ffn_mask))):
        for steps in (1, 3):
            expected = compute(model, cpu, torch.float32, steps)
            largest = max(value.abs().max().item() for key, value in expected.items() if value.numel() and "." in key)
            bound = 1e-4 if steps == 1 else 1e-3  # g / |g| of an ascent step amplifies rounding errors
            for dtype, bound in ((torch.float32, bound), (torch.bfloat16, None)):
                found = compute(model, device, dtype, steps)
                errors = {
                    key: (found[key] - value).abs().max().item() / max(value.abs().max().item(), largest / 100)
                    for key, value in expected.items()
                    if value.numel()
                }
                worst = max(errors, key=lambda key: (math.isnan(errors[key]), errors[key]))
                of_bf16 = math.isfinite(errors[worst]) and errors["loss"] < 1e-2 and errors["logits"] < 0.1
                shown = f"loss {errors['loss']:.1e}, logits {errors['logits']:.1e}, {worst} {errors[worst]:.1e}"
                what = f"relative errors, {name}, K = {steps}, {str(dtype)[6:]}"
                record(what, shown, of_bf16 if bound is None else errors[worst] < bound)


def start_script(path, name, *flags, launcher=()):
    """The process of a script, and the path of the file that it writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = map(str, [sys.executable, *launcher, name, *flags])
    with open(path.with_name("log"), "w") as log:
        return subprocess.Popen(list(command), cwd=ROOT, stdout=log, stderr=log), path


def finish(process, path):
    """The tensors of the file that a script writes. Raises BadInput with the script's last line if there is none."""
    process.wait()
    if not path.is_file():  # the exit code is no proof: without matplotlib only the plot fails
        log = path.with_name("log").read_text("utf8", "replace").splitlines() or ["?"]
        print(*log[-25:], sep="\n", file=sys.stderr)
        raise BadInput(f"{path.name} was not written: {log[-1]}")
    return safetensors.read_with_metadata(path)[0]


def start_search(options, folder, model, output, *flags, launcher=()):
    """The process of a search, and the path of its coefficients."""
    where = ["--model", folder / model, "--output", folder / output]
    where += ["--corpus", options.corpus or folder / "corpus.txt"]
    path = folder / output / model / "coefficients.safetensors"
    return start_script(path, "search.py", *where, *flags, launcher=launcher)


def start_quick(options, folder, output, *flags, launcher=()):
    """`start_search` for a search of a few seconds, without dropout."""
    quick = ["--corpus", folder / "quick.txt", "--batch-size", 16, "--block", 32, "--mini-epoch", 0.1, "--gamma", 1e-9]
    quick += ["--learning-rate", 1e-3, "--precision", "fp32", "--device", options.device]
    return start_search(options, folder, "still", output, *quick, *flags, launcher=launcher)


def difference(tensors, others):
    """The mean difference of the coefficients of two searches."""
    return max((tensors[name] - others[name]).abs().mean().item() for name in ("head", "ffn"))


def check_resume(options, folder):
    """A search that is killed and rerun finds the same coefficients as one that is not killed."""
    process, path = start_quick(options, folder, "killed")
    while process.poll() is None and not path.with_name("search.state.safetensors").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    killed, whole = (finish(*start_quick(options, folder, output)) for output in ("killed", "whole"))
    error = difference(killed, whole)
    record("killed and resumed: mean difference of c", f"{error:.1e}", error < 1e-4)


def check_processes(options, folder):
    """Two processes find the same coefficients as one: by NCCL on two GPUs, by gloo on one."""
    device = pick_device(options.device)
    if device.type == "mps":
        return record("two processes", "left out: they cannot share the work on MPS")
    shared = device.type == "cuda" and (torch.cuda.device_count() < 2 or ":" in options.device)
    flags = ["--device", device] * shared
    two = finish(*start_quick(options, folder, "two", *flags, launcher=[*TORCHRUN, 2]))
    error = difference(finish(*start_quick(options, folder, "whole")), two)
    record(f"two processes on {1 if shared else 2} devices: mean difference of c", f"{error:.1e}", error < 1e-4)


def check_scripts(options, folder):
    """draw.py and finetune.py, of an uneven ticket and of the full model."""
    where = ["--model", folder / "still", "--output", folder / "whole", "--task", folder / "task.csv"]
    results = folder / "whole" / "still" / "task"
    finish(*start_quick(options, folder, "whole"))
    finish(*start_script(results / "ticket.safetensors", "draw.py", *where))
    size = ["--epochs", 2, "--train-rows", 100 if options.small else 2000, "--device", options.device]
    for ticket, method in (("drawn", "freelb"), ("none", "infobert")):
        run, flags = results / f"{ticket}-{method}-seed0", ["--ticket", ticket, "--method", method]
        finish(*start_script(run / "model.safetensors", "finetune.py", *where, *size, *flags))
        seconds = read_metrics(run)["seconds"]
        record(f"finetune.py --ticket {ticket} --method {method}", f"{seconds:.0f} s of training", True)


def check_speed(options, folder, what, sides, batch_sizes):
    """Each side compared with the first one, at BERT-base's sizes."""
    from benchmarks import training

    tolerance = 0.02 if what == "search" else 2e-3  # a new classifier's loss is about ln 2 with any encoder
    task, rows, steps = str(folder / "task.csv"), 200 if options.small else 1600, 2 if options.small else 10
    for batch_size in (4,) if options.small else batch_sizes:
        given = {"block": 16 if options.small else 128, "batch_size": batch_size, "device": options.device}
        given |= {"what": what, "adv_steps": 3, "steps": steps, "rows": rows, "task": task, "profile": False}
        first = None
        for side in sides:
            if pick_device(options.device).type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            figures = training.time_training(SimpleNamespace(**given), side, "auto", folder / "base")
            first = first or figures
            row = f"{1000 * figures['seconds']:.1f} ms, {figures['seconds'] / first['seconds']:.2f} times, "
            row += "{speed:,.0f} tokens/s, {of_peak:.0%} of peak, {memory:.1f} GB".format(**figures)
            row += f", classifying {1000 * figures['classify']:.1f} ms" if "classify" in figures else ""
            is_same = "its ticket" in side or abs(figures["loss"] - first["loss"]) < tolerance
            record(f"{what}, batches of {batch_size}: {side}", row, is_same)


def check_search(options, folder):
    """MiniLM's tickets from the GPU, with two seeds, and from the CPU: the pruned heads and neurons that they share."""
    if not (options.weights or options.small):
        return record("tickets", "left out: needs --weights")
    found, more = {}, ["--mlm-head-steps", 5, "--block", 32] * options.small

    def begin(device, seed, output):
        flags = ["--device", device, "--seed", seed, *more]
        return time.monotonic(), *start_search(options, folder, "minilm", output, *flags)

    of_cpu = begin("cpu", 0, "searched by the CPU")  # at the same time as those of the GPU
    for device, seed in ((options.device, 0), (options.device, 1), ("the CPU", 0)):
        start, *search = of_cpu if device == "the CPU" else begin(device, seed, f"searched-{seed}")
        tensors = finish(*search)
        found[device, seed] = [~mask for mask in draw_masks(tensors["head"], tensors["ffn"], 1 / 6, 0.3)]
        record(f"search on {device}, seed {seed}, with another beside it", f"{time.monotonic() - start:.0f} s")
        if len(found) > 1:
            shares = [(a & b).sum() / a.sum() for a, b in zip(found[options.device, 0], found[device, seed])]
            record("its ticket shares heads, neurons", ", ".join(f"{share:.0%}" for share in shares))


def check_attack(options, folder):
    """Sentences a second of TextFooler with 1 and 8 processes. Needs TextAttack."""
    if importlib.util.find_spec("textattack") is None:
        return record("TextFooler", "left out: TextAttack is not installed")
    flags = ["--model", folder / "minilm", "--task", folder / "task.csv", "--output", folder / "attack", "--device"]
    flags = [*map(str, flags), str(pick_device(options.device)), "--ticket", "none"]
    run = {"cwd": ROOT, "check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([sys.executable, "finetune.py", *flags, "--epochs", "1", "--train-rows", "200"], **run)
    n = 4 if options.small else 64
    for processes in (1, 2 if options.small else 8):
        launcher = [*TORCHRUN, str(processes), "--"]
        start = time.monotonic()
        given = ["--n", str(n), "--suffix", str(processes)]  # a suffix for the results, so that none are reused
        subprocess.run([sys.executable, *launcher, "attack.py", *flags, *given], **run)
        record(f"TextFooler, {processes} processes", f"{n / (time.monotonic() - start):.2f} sentences/s with start-up")


OURS, SDPA, BY_LENGTH = "orticket", "transformers, SDPA", "transformers, SDPA, by length"
TICKETS = "its ticket", "its ticket, x 64"
PARTS = {  # in the order in which they run
    "equal": check_equal,
    "resume": check_resume,
    "processes": check_processes,
    "scripts": check_scripts,
    "search": lambda *given: check_speed(*given, "search", (OURS, SDPA), (32, 128)),
    "finetune": lambda *given: check_speed(*given, "finetune", (OURS, *TICKETS, SDPA, BY_LENGTH), (32, 128)),
    "tickets": check_search,
    "compiled": lambda *given: check_speed(*given, "search", (OURS, f"{SDPA}, compiled"), (32,)),
    "compiled finetune": lambda *given: check_speed(*given, "finetune", (OURS, f"{BY_LENGTH}, compiled"), (32,)),
    "attack": check_attack,
}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the part that runs, too
    cli.run(main)
