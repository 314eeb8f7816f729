"""Imported first by every script: Ctrl-C during the other imports, which take seconds, then also ends in one line."""

import os
import signal
import sys

INTERRUPTED = "interrupted; run the same command again to resume"


def stop(code, line):
    """End the process at once, with one line."""
    line = f"{os.path.basename(sys.argv[0])}: {line}\n"
    os.write(2, line.encode(errors="backslashreplace"))
    os._exit(code)


def on_interrupt(number, frame):
    """Handle Ctrl-C: end during an import, where libraries may hide exceptions; otherwise raise KeyboardInterrupt."""
    while frame and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    if frame:
        stop(130, INTERRUPTED)
    raise KeyboardInterrupt


def read_number(name, default):
    """A number that torchrun sets in the environment."""
    text = os.environ.get(name) or default
    if not text.isdecimal():
        stop(2, f"error: {name} is {text!r}, not a number: unset it, or start the processes with torchrun")
    return int(text)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, on_interrupt)
WORLD = read_number("WORLD_SIZE", "1")
RANK = read_number("RANK", "0") if WORLD > 1 else 0
LOCAL_RANK = read_number("LOCAL_RANK", "0")
os.environ["MPLBACKEND"] = "agg"  # figures are only saved; another backend, such as a notebook's, may not be installed
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # operators that Apple's GPUs lack run on the CPU
