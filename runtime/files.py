"""Files and folders: atomic writes, JSON, checksums, and where each script writes."""

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
    """Yield a temporary path, for a file or a folder, that is renamed to `path` if the block succeeds.

    Raises BadInput with the operating system's reason if it cannot be written, for example on a full disk.
    """
    tmp_path = f"{path}.part"  # always the same name, so that the next run overwrites what a killed run left
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield tmp_path
        os.replace(tmp_path, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)  # a folder; below, a file
        with contextlib.suppress(OSError):
            os.remove(tmp_path)


def write_text(path, text):
    with atomic_write(path) as tmp_path, open(tmp_path, "w", encoding="utf8", newline="\n") as file:
        file.write(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path):
    """The JSON object in a file, as a dictionary. Raises BadInput if the file holds none."""
    try:
        with open(path, encoding="utf8") as file:
            value = json.load(file)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} is not a JSON object")
    return value


def sha256(path, start=0):
    """The sha256 of a file's content from byte `start` on, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def model_folder(root, model):
    """ROOT/MODEL, where MODEL is the last part of the model's name, or the folder or archive of a weights file."""
    path = Path(os.path.abspath(model))
    if path.suffix == ".zip":
        return Path(root) / path.stem
    is_file = path.is_file() or path.with_name(f"{path.name}.index").is_file()  # TensorFlow's bert_model.ckpt
    return Path(root) / (path.parent.name if is_file else path.name)


def task_folder(task):
    """The name of a task's folder. For a custom file: its name without the suffix."""
    return Path(os.path.abspath(task)).stem


def run_name(options):
    """The name of the folder of a fine-tuning run."""
    ablation = f"-{options.ablation}" if options.ablation else ""
    number = "" if options.ticket_seed is None else options.ticket_seed
    return f"{Path(options.ticket).stem}{number}-{options.method}{ablation}-seed{options.seed}"


def writable(folder):
    """Create the folder and check that it can be written. Raises BadInput now rather than after minutes of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"cannot write {folder}: {error.strerror or error}") from None
    return folder
