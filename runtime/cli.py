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
    """The type and the first line of an exception's message, at most 200 characters."""
    return f"{type(error).__name__} {str(error).strip()}".strip().splitlines()[0][:200]


def run(main):
    """Run a script's main(). Bad input ends in one line and exit code 2, Ctrl-C in one line and exit code 130."""
    script = os.path.basename(sys.argv[0])
    try:
        main()
        sys.stdout.flush()
    except BadInput as error:
        code, line = 2, f"{script}: error: {error}"
    except OSError as error:
        code, line = 2, f"{script}: error: {error.filename or 'output'}: {error.strerror or error}"
    except KeyboardInterrupt:
        code, line = 130, f"\n{script}: interrupted; run the same command again to resume"
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error):  # gloo's message when another process is gone
            raise
        code, line = 1, f"{script}: another process has ended"
    else:
        return
    if int(os.environ.get("RANK", 0)):
        time.sleep(2)  # torchrun ends the others as soon as one fails: let process 0 print the error they share
    print(line, file=sys.stderr)
    sys.exit(code)


def option(
    default, help, at_least=None, above=None, below=None, at_most=None, choices=None, positional=False, group=None
):
    """A field of a script's Options: default, help text, bounds, and the heading under which --help lists it."""
    bounds = {"at_least": at_least, "above": above, "below": below, "at_most": at_most}
    metadata = {"help": help, "choices": choices, "positional": positional, "group": group, **bounds}
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def parse(options, description):
    """Parse the command line into the dataclass `options`. Each field is a flag, with dashes for underscores."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    groups = {None: parser}
    for field in dataclasses.fields(options):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        add_argument(groups[name], field)
    return options(**vars(parser.parse_args()))


def add_argument(group, field):
    """Add the flag of one field to an argparse group."""
    flag, metadata, default = "--" + field.name.replace("_", "-"), field.metadata, field.default
    help = metadata["help"].replace("%", "%%")
    if field.type is bool:
        group.add_argument(flag, action="store_true", help=help)
    elif field.type is tuple:
        help += f" [{' '.join(default)}]" if default else ""
        group.add_argument(flag, nargs="+", default=default, metavar="NAME", help=help)
    else:
        help += "" if default is None else f" [{shown(default)}]"
        more = {"nargs": "?"} if metadata["positional"] else {}
        if not metadata["positional"] and not metadata["choices"]:
            more["metavar"] = field.name.split("_")[-1].upper()
        group.add_argument(
            field.name if metadata["positional"] else flag,
            type=lambda text: parse_bounded(field, text),
            default=default,
            choices=metadata["choices"],
            help=help,
            **more,
        )


def shown(default):
    """A default as --help shows it: 0.1 and 2e-05, but 1/6."""
    if isinstance(default, float) and float(f"{default:.4g}") != default:
        return Fraction(default).limit_denominator(100)
    return f"{default:.4g}" if isinstance(default, float) else default


def parse_bounded(field, text):
    """Convert `text`, a fraction if need be, to the field's type and check its bounds. argparse prints the error."""
    try:
        value = float(Fraction(text)) if field.type is float and "/" in text else field.type(text)
        if field.type is float and not math.isfinite(value):
            raise ValueError
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a number' if field.type is float else 'an integer'}")
    bounds = field.metadata
    for name, holds in (
        ("at_least", lambda bound: value >= bound),
        ("above", lambda bound: value > bound),
        ("below", lambda bound: value < bound),
        ("at_most", lambda bound: value <= bound),
    ):
        if bounds[name] is not None and not holds(bounds[name]):
            raise argparse.ArgumentTypeError(f"{text} must be {name.replace('_', ' ')} {bounds[name]}")
    return value


def flags(options, *names):
    """The named options that differ from their defaults, as flags, to print a command to type."""
    typed = ""
    for name in names:
        value = getattr(options, name)
        if value != getattr(type(options), name):
            values = value if isinstance(value, (tuple, list)) else (value,)
            typed += f" --{name.replace('_', '-')} {shlex.join(map(str, values))}"
    return typed


def progress(total, initial=0, description="", unit="step"):
    """A tqdm bar with rate and remaining time. Silent without a terminal and in all processes except process 0."""
    settings = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
    settings |= {"disable": os.environ.get("RANK", "0") != "0" or None, "dynamic_ncols": True, "unit": unit}
    return tqdm(total=total, initial=initial, desc=description, **settings)
