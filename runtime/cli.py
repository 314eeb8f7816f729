"""The command line of every script: options, errors in one line, progress bars."""

import argparse
import dataclasses
import math
import os
import shlex
import sys
import time
from fractions import Fraction

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
            type=lambda text, field=field: parse_bounded(field, text),
            default=field.default,
            choices=field.metadata["choices"],
            **more,
            help=help if field.default is None else f"{help} [{shown}]",
        )
    return options(**vars(parser.parse_args()))


def parse_bounded(field, text):
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


def progress(total, initial=0, description="", unit="step"):
    """A tqdm bar with rate and remaining time; silent at all processes but the first, and without a terminal."""
    settings = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
    settings |= {"disable": os.environ.get("RANK", "0") != "0" or None, "dynamic_ncols": True, "unit": unit}
    return tqdm(total=total, initial=initial, desc=description, **settings)
