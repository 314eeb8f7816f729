"""The command line of every script: options, errors in one line, progress."""

import argparse
import contextlib
import dataclasses
import math
import operator
import os
import re
import shlex
import sys
import time
import traceback
from fractions import Fraction

from runtime.start import INTERRUPTED, RANK

BOUNDS = {"at_least": operator.ge, "above": operator.gt, "below": operator.lt, "at_most": operator.le}
MEMORY = "not enough memory: lower --batch-size or the tokens per text, raise --grad-accum-steps, add --checkpointing"
LIBRARY_ERRORS = {  # pattern in a library's message -> (exit code, what it means here)
    "out of memory|allocate memory|not enough memory|bad_alloc|ALLOC_FAILED": (1, MEMORY),
    "Connection closed by peer": (1, "another process has ended"),  # gloo's
    "home directory": (2, "error: there is no home directory for the caches: set HOME"),
    "surrogates not allowed": (2, "error: a name or a text is not valid UTF-8"),
}


class BadInput(Exception):
    """User input that cannot be used. The message is one line: what is wrong, its value, the remedy."""


def one_line(error):
    """The type and the first line of an exception's message, at most 200 characters."""
    return f"{type(error).__name__} {str(error).strip()}".strip().splitlines()[0][:200]


def first_few(values, count=10):
    """The first texts joined by commas, each cut to 40 characters."""
    values = list(values)
    shown = [value if len(value) <= 40 else f"{value[:37]}..." for value in values[:count]]
    return ", ".join(shown) + (f", ... ({len(values):,} in all)" if len(values) > count else "")


def run(main):
    """Run a script's main(). Errors are printed in one line. ORTICKET_DEBUG=1 also shows the traceback."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None: closed
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("ORTICKET_DEBUG") == "1":
            traceback.print_exc()
        if RANK:
            time.sleep(2)  # torchrun ends the others as soon as one fails: let process 0 print the error they share
        code, line = explain(error)
        with contextlib.suppress(OSError):
            print("\n" * (code == 130) + f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
        if isinstance(error, BrokenPipeError):  # Python would flush again at exit, and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(code)


def explain(error):
    """(exit code, line) for an exception: 2 for what the user can change, 130 for Ctrl-C, 1 for anything else."""
    if isinstance(error, BadInput):
        return 2, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return 1, "standard output was closed"
    if isinstance(error, MemoryError):
        return 1, MEMORY
    for pattern, meaning in LIBRARY_ERRORS.items():
        if re.search(pattern, str(error)):
            return meaning
    if isinstance(error, ModuleNotFoundError):
        return 2, f"error: the package {error.name} is not installed: pip install -r requirements.txt"
    if isinstance(error, OSError):
        return 2, f"error: {error.filename or 'output'}: {error.strerror or error}"
    return 1, f"internal error: {one_line(error)}; set ORTICKET_DEBUG=1 for the traceback"


def option(default, help, choices=None, positional=False, group=None, **bounds):
    """A field of a script's Options: default, help text, the heading under which --help lists it, and bounds, which are
    keys of BOUNDS."""
    assert bounds.keys() <= BOUNDS.keys(), bounds
    metadata = {"help": help, "choices": choices, "positional": positional, "group": group, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def parse(options, description, **defaults):
    """Parse the command line into the dataclass `options`. Each field is a flag, with dashes for underscores.

    defaults: override those of the fields.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    groups = {None: parser}
    for field in sorted(dataclasses.fields(options), key=lambda field: field.name not in vars(options)):
        name = field.metadata["group"]  # inherited options come after the script's own
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        add_argument(groups[name], field)
    parser.set_defaults(**defaults)
    return options(**vars(parser.parse_args()))


def add_argument(group, field):
    """Add the flag of one field to an argparse group."""
    metadata, default = field.metadata, field.default
    flag = field.name if metadata["positional"] else "--" + field.name.replace("_", "-")
    help = metadata["help"].replace("%", "%%")
    if field.type is bool:
        more = {"action": "store_true"}
    elif field.type is tuple:
        help += f" [{' '.join(default)}]" if default else ""
        more = {"nargs": "+", "metavar": "NAME", "choices": metadata["choices"]}
    else:
        help += "" if default is None else f" [{shown(default)}]"
        more = {"type": lambda text: parse_bounded(field, text), "choices": metadata["choices"]}
        if metadata["positional"]:
            more["nargs"] = "?"
        elif not metadata["choices"]:
            more["metavar"] = field.name.split("_")[-1].upper()
    group.add_argument(flag, default=default, help=help, **more)


def shown(default):
    """A default as --help shows it: 0.1 and 2e-05, but 1/6."""
    if isinstance(default, float) and float(f"{default:.4g}") != default:
        return Fraction(default).limit_denominator(100)
    return f"{default:.4g}" if isinstance(default, float) else default


def parse_bounded(field, text):
    """Convert `text`, which may be a fraction, to the field's type and check its bounds. argparse prints the error."""
    try:
        value = float(Fraction(text)) if field.type is float and "/" in text else field.type(text)
        if field.type is float and not math.isfinite(value):
            raise ValueError
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a number' if field.type is float else 'an integer'}")
    for name, bound in field.metadata["bounds"].items():
        if not BOUNDS[name](value, bound):
            raise argparse.ArgumentTypeError(f"{text} must be {name.replace('_', ' ')} {bound}")
    return value


def flags(options, *names):
    """The named options that differ from their defaults, as flags, for printing a command."""
    typed = ""
    for name in names:
        value = getattr(options, name)
        if value != getattr(type(options), name):
            values = value if isinstance(value, (tuple, list)) else (value,)
            typed += f" --{name.replace('_', '-')} {shlex.join(map(str, values))}"
    return typed


class progress(contextlib.AbstractContextManager):
    """The progress of a loop: tqdm's bar on a terminal, lines with the time elsewhere. Only process 0 shows it.

    A line is printed after each of `parts` parts of the loop, and after SILENCE seconds without one. A loop that takes
    more than LONG seconds also gets a line with the estimated time and with what would make it `faster`.
    """

    SHORT, LONG, SILENCE = 5, 60, 100  # no line is printed in the first SHORT seconds

    def __init__(self, total, initial=0, description="", unit="step", parts=10, faster=""):
        self.total, self.n, self.description, self.parts, self.faster = total, initial, description, parts, faster
        self.size, self.units = (1e6, "MB") if unit == "B" else (1, f"{unit}s")
        self.begun = self.shown = time.monotonic()
        self.initial, self.part, self.rate, self.is_estimated = initial, self.current_part(), 0, False
        self.status = lambda: ""
        from tqdm import tqdm

        shape = {"unit": unit, "unit_scale": unit == "B", "dynamic_ncols": True}
        # disable=None: unless stderr is a terminal
        self.bar = tqdm(desc=description, total=total, initial=initial, disable=RANK > 0 or None, **shape)

    def __exit__(self, kind, *_):
        self.bar.close() if kind else self.close()  # after an error, the status may raise another

    def close(self):
        self.refresh_bar()
        self.bar.close()

    def update(self, n=1):
        if self.current_part() > self.part:  # by an earlier update: the status is set now
            self.show(is_due=True)
        self.n += n
        self.measure()
        self.show()

    def set_postfix_str(self, status, refresh=True):
        """What to show after the rate: a text, or a function that returns it, called only when it is shown."""
        self.status = status if callable(status) else lambda: status
        if refresh:
            self.measure()
            self.show(is_due=self.current_part() > self.part)

    def measure(self):
        self.rate = (time.monotonic() - self.begun) / max(1, self.n - self.initial)  # seconds per unit

    def current_part(self):
        return self.n * self.parts // max(1, self.total)

    def show(self, is_due=False):
        """Update the bar, or print a line if `is_due` or if there was none for long."""
        now, seconds = time.monotonic(), self.rate * max(0, self.total - self.n)
        if RANK or now - self.shown < 0.1:
            return
        left = f"{self.rate * self.size:.3g} s each, {duration(seconds)}"
        is_long = now - self.begun > self.SHORT and self.n > self.initial
        if is_long and not self.is_estimated:
            self.is_estimated = True
            if seconds > self.LONG:
                to_go = f"{(self.total - self.n) / self.size:,.0f} {self.units} to go"
                self.print(f"{to_go}, {left} at most{self.faster and '; faster: '}{self.faster}")
        if not self.bar.disable:
            self.refresh_bar()
        elif is_long and (is_due or now - self.shown > self.SILENCE):
            done = f"{self.n / self.size:,.0f} of {self.total / self.size:,.0f} {self.units}"
            self.print(", ".join(filter(None, [done, f"{left} left", self.status()])))
        else:
            return
        self.shown, self.part = now, self.current_part()

    def refresh_bar(self):
        if not self.bar.disable:
            self.bar.set_postfix_str(self.status(), refresh=False)
            self.bar.update(self.n - self.bar.n)

    def print(self, text):
        """Print a line, above the bar if there is one."""
        self.bar.write(f"{time.strftime('%H:%M:%S')} {self.description}: {text}", file=sys.stderr)


def duration(seconds):
    """A time in words, rounded."""
    size, unit = next((size, unit) for size, unit in ((3600, "h"), (60, "min"), (0, "s")) if seconds >= 1.5 * size)
    return f"{seconds / (size or 1):.2g} {unit}"
