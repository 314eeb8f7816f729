"""A cache of files that can be rebuilt: unpacked archives, tokens."""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from pathlib import Path

import filelock

from runtime.cli import BadInput
from runtime.files import writable


def folder():
    """The folder of the cache: $XDG_CACHE_HOME/orticket, or ~/.cache/orticket."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orticket"
    except RuntimeError as error:  # this user has no home
        return temporary_folder(f"there is no cache, {error}")


def get(path, read, build):
    """read(path) of a file or folder in the cache. If it is missing or `read` raises BadInput, build(path) makes it.

    Of several processes, one builds it and the others wait. A cache that cannot be written is replaced by a temporary
    folder.
    """
    if os.path.exists(path):  # False, not an error, in a folder without read permission
        with contextlib.suppress(BadInput, FileNotFoundError):  # it may have been removed meanwhile
            return read(path)  # without the lock: the cache may be read-only
    path = writable_folder(path.parent) / path.name
    with filelock.FileLock(f"{path}.lock"):
        if path.exists():
            try:
                return read(path)
            except BadInput as error:
                print(f"{error}: making it again")
        build(path)
    return read(path)


def writable_folder(path):
    """The folder `path`, created if needed, or a temporary one if it cannot be written."""
    try:
        return writable(path)
    except BadInput as error:
        return temporary_folder(str(error))


@functools.cache
def temporary_folder(reason):
    """A folder that is removed when the process ends. Prints the reason why it is needed."""
    print(f"{reason}: using a temporary folder instead")
    folder = tempfile.mkdtemp(prefix="orticket-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
