"""Files and folders: atomic writes, JSON, checksums, where each script writes."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from runtime.cli import BadInput


@contextlib.contextmanager
def atomic_write(path):
    """A path to write to, a file or a folder, renamed to `path` when the block ends well and else removed.

    Raises BadInput with the operating system's reason where it cannot be written, as on a full disk.
    """
    tmp_path = f"{path}.part"  # always the same name: what a killed run left half written is written over
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield tmp_path
        os.replace(tmp_path, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if os.path.isdir(tmp_path):
            shutil.rmtree(tmp_path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.remove(tmp_path)


def write_json(path, value):
    with atomic_write(path) as tmp_path, open(tmp_path, "w", encoding="utf8") as file:
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


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
