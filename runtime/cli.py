"""What every script needs and no concept owns: errors, files, seeds, the device and its precision, options."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import resource
import shlex
import shutil
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm


class BadInput(Exception):
    """Something the user gave cannot be used. The message is one line: the thing, its value, the remedy."""


def one_line(error):
    """The beginning of what a library says, in one line."""
    return f"{type(error).__name__} {str(error).strip()}".strip().splitlines()[0][:200]


def last_words(stderr, code):
    """The last line that a process wrote before it ended; where it wrote none, its exit code."""
    return (stderr.strip().splitlines() or [f"exit code {code}"])[-1]


def run(main):
    """Run a script's main(): bad input is one line and exit code 2, Ctrl-C one line and 130."""
    script = os.path.basename(sys.argv[0])
    try:
        main()
        sys.stdout.flush()
    except BadInput as error:
        code, line = 2, f"{script}: error: {error}"
    except OSError as error:
        code, line = 2, f"{script}: error: {error.filename or 'output'}: {error.strerror or error}"
    except KeyboardInterrupt:
        code, line = 130, f"\n{script}: interrupted; the same command goes on where it can"
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error):  # gloo's words for another process that is gone
            raise
        code, line = 1, f"{script}: another process has ended"
    else:
        return
    if int(os.environ.get("RANK", 0)):
        time.sleep(2)  # of several processes with the same error one shows it, and torchrun then ends the others
    print(line, file=sys.stderr)
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------- options


def option(default, help, at_least=None, above=None, below=None, at_most=None, choices=None, positional=False):
    """A field of a script's Options: its default, the sentence that --help shows, and what values it takes."""
    limits = {"at_least": at_least, "above": above, "below": below, "at_most": at_most}
    metadata = {"help": help, "choices": choices, "positional": positional, **limits}
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def parse(options, description):
    """The command line as an instance of the dataclass `options`: a flag for each field, dashes for underscores."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(options):
        flag, kind = "--" + field.name.replace("_", "-"), field.type
        shown = field.default
        if isinstance(shown, float):  # 0.1 and 2e-05, but 1/6
            shown = f"{shown:.4g}" if float(f"{shown:.4g}") == shown else Fraction(shown).limit_denominator(100)
        help = field.metadata["help"].replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=help)
            continue
        if kind is tuple:
            help += f" [{' '.join(shown)}]" if shown else ""
            parser.add_argument(flag, nargs="+", default=shown, metavar="NAME", help=help)
            continue
        if field.metadata["positional"]:
            flag, more = field.name, {"nargs": "?"}
        else:
            more = {"metavar": None if field.metadata["choices"] else field.name.split("_")[-1].upper()}
        parser.add_argument(
            flag,
            type=lambda text, field=field: within(field, text),
            default=field.default,
            choices=field.metadata["choices"],
            **more,
            help=help if field.default is None else f"{help} [{shown}]",
        )
    return options(**vars(parser.parse_args()))


def within(field, text):
    """`text` as the field's type, inside the field's limits; a number may be a fraction. argparse shows the error."""
    try:
        value = float(Fraction(text)) if field.type is float and "/" in text else field.type(text)
        if field.type is float and math.isinf(value):
            raise ValueError
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a number' if field.type is float else 'an integer'}")
    limits = field.metadata
    for name, wrong in (  # "not value >= bound", for NaN is in no interval
        ("at_least", lambda bound: not value >= bound),
        ("above", lambda bound: not value > bound),
        ("below", lambda bound: not value < bound),
        ("at_most", lambda bound: not value <= bound),
    ):
        if limits[name] is not None and wrong(limits[name]):
            raise argparse.ArgumentTypeError(f"{text} must be {name.replace('_', ' ')} {limits[name]}")
    return value


def flags(options, *names):
    """Those of the named options that are not at their defaults, as they are typed: for the command to type next."""
    typed = ""
    for name in names:
        value = getattr(options, name)
        if value != getattr(type(options), name):
            values = value if isinstance(value, (tuple, list)) else (value,)
            typed += f" --{name.replace('_', '-')} {shlex.join(map(str, values))}"
    return typed


# ---------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def replacing(path):
    """A path to write to, a file or a folder, renamed to `path` when the block ends well and else removed.

    Raises BadInput with the operating system's reason where it cannot be written, as on a full disk.
    """
    beside = f"{path}.part"  # always the same name: what a killed run left half written is written over
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if os.path.isdir(beside):
            shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.remove(beside)


def write_json(path, value):
    with replacing(path) as beside, open(beside, "w", encoding="utf8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")


def read_json(path):
    try:
        with open(path, encoding="utf8") as file:
            return json.load(file)
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}") from None


def model_folder(root, model):
    """ROOT/MODEL, by the last part of the model's name; of a file, by its folder or its archive."""
    path = Path(os.path.abspath(model))
    if path.suffix == ".zip":
        return Path(root) / path.stem
    inside = path.is_file() or path.with_name(f"{path.name}.index").is_file()  # bert_model.ckpt
    return Path(root) / (path.parent.name if inside else path.name)


def task_folder(task):
    """The name of a task's folder: of one's own file, its name without the ending."""
    return Path(os.path.abspath(task)).stem


def run_name(options):
    """The name of a fine-tuning run's folder."""
    ablation = f"-{options.ablation}" if options.ablation else ""
    return f"{Path(options.ticket).stem}-{options.method}{ablation}-seed{options.seed}"


def cache_folder():
    """For what can be made again: $XDG_CACHE_HOME/orticket, or ~/.cache/orticket."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orticket"


def output_folder(root, model):
    """`model_folder`, made and tried."""
    return writable(model_folder(root, model))


def writable(folder):
    """The folder, made and tried at once: a run of minutes must not end at one that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # a name of its own in each of several processes
    except OSError as error:
        raise BadInput(f"cannot write {folder}: {error.strerror or error}") from None
    return folder


# ---------------------------------------------------------------------------------------------------- machine


DEFAULT_MODEL = "bert-base-uncased" if torch.cuda.is_available() else "minilm"
MODEL_HELP = (
    "minilm (embedded), bert-base-uncased, roberta-base or another name on the hub, a folder, a file of weights"
)


def first_line(model, device, dtype):
    """What every script that computes says first: the model and why it, the machine, the precision."""
    has = "with" if device.type == "cuda" else "without"
    why = f" (the default {has} CUDA)" if model == DEFAULT_MODEL else ""
    world = int(os.environ.get("WORLD_SIZE", 1))
    times = f"{world} processes, each " * (world > 1)
    return f"model {model}{why} on {times}{describe(device)} in {precision_name(dtype)}"


def pick_device():
    """The GPU, of several that of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= cards:
        raise BadInput(f"more processes than the {cards} GPUs of this machine: start as many with --nproc-per-node")
    return torch.device("cuda", number)


def pick_precision(device, precision):
    """torch.bfloat16 or torch.float32 from 'auto', 'bf16' or 'fp32'; auto: bfloat16 where the hardware multiplies it"""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        precision = "bf16" if fast else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def precision_name(dtype):
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def describe(device):
    """The machine in a few words, for a script's first line."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads"


def autocast(device, dtype):
    """The parameters stay float32; matrix products run in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_memory(device):
    """Bytes: the most that this process ever held, or on a GPU that torch allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, IndexError):  # Linux's getrusage counts the parent's before the exec as well
        return int(Path("/proc/self/status").read_text("utf8").split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seed_step(*numbers):
    """Seed torch from these integers alone, mixed by the constants of Knuth's MMIX. Each training step seeds itself
    from (seed, step), so that a run that was killed and resumed draws what one that was never killed draws."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    torch.manual_seed(seed)


def learning_rate(peak, step, steps, warmup):
    """BERT's schedule: linearly up to `peak` over warmup x steps, then linearly down to 0."""
    rise = max(1, round(warmup * steps))
    return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def set_learning_rate(optimizer, peak, step, steps, warmup):
    """That of the schedule; in a group that has "times", so many times that."""
    for group in optimizer.param_groups:
        group["lr"] = group.get("times", 1) * learning_rate(peak, step, steps, warmup)


def decay_groups(model, weight_decay):
    """AdamW's two groups: matrices decay, biases and LayerNorms do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def progress(total, initial=0, description="", unit="step"):
    """A tqdm bar with rate and remaining time; silent at all processes but the first, and without a terminal."""
    settings = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
    settings |= {"disable": os.environ.get("RANK", "0") != "0" or None, "dynamic_ncols": True, "unit": unit}
    return tqdm(total=total, initial=initial, desc=description, **settings)


def versions():
    """Of what can change a number: written into everything that a script makes."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "tokenizers", "numpy")}
    return {"python": platform.python_version(), **packages}
