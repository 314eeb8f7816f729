"""The provenance of files: whether one is up to date, and the state from which an interrupted run resumes."""

import importlib.metadata
import json
import os
import platform

from checkpoints.safetensors import read_with_metadata
from runtime.cli import BadInput
from runtime.files import read_json


def is_up_to_date(path, provenance, overwrite, elsewhere="another --output"):
    """Whether the file at `path` exists and has this provenance, so that it need not be made again.

    A file with a different provenance, or one that cannot be read, is removed if `overwrite` is set. Otherwise raises
    BadInput, with `elsewhere` as an alternative to --overwrite. Models, corpora and tasks are compared by their sha256,
    not by their paths.
    """
    if not os.path.exists(path):
        return False
    try:
        metadata = read_json(path) if str(path).endswith(".json") else read_with_metadata(path)[1]
        if not isinstance(metadata, dict) or not isinstance(metadata.get("settings"), dict):
            raise BadInput(f"{path} has no provenance")
    except BadInput as error:
        if not overwrite:
            raise BadInput(f"{error}: use --overwrite or {elsewhere}") from None
        metadata = {"settings": {}}
    provenance = json.loads(json.dumps(provenance))
    contents = [key for key in provenance if key.endswith("sha256") or key == "config"]
    differs = [f"another {key}" for key in contents if metadata.get(key) != provenance[key]]
    old, new = metadata["settings"], provenance["settings"]
    names = ("model", "corpus", "objective", "task", "revision", "data_revision")  # their contents are compared above
    compared = [key for key in new if key not in names]
    differs += [f"{key} {old.get(key)!r}, not {new[key]!r}" for key in compared if old.get(key) != new[key]]
    if not differs:
        return True
    if not overwrite:
        raise BadInput(f"{path} was made with other settings ({', '.join(differs)}): use --overwrite or {elsewhere}")
    os.remove(path)
    return False


def load_checkpoint(path, provenance, overwrite):
    """(tensors, metadata) of an interrupted run with this provenance; ({}, {}) if there is none."""
    if not is_up_to_date(path, provenance, overwrite):
        return {}, {}
    tensors, metadata = read_with_metadata(path)
    return dict(tensors), metadata


def training_state(optimizer, **modules):
    """{name: tensor}: the state of the modules and of the optimizer, from which an interrupted run resumes."""
    tensors = {
        f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()
    }
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": tensor for key, tensor in state.items()}
    return tensors


def restore_state(tensors, optimizer, **modules):
    """Load what `training_state` returned into the modules and the optimizer."""
    for name, module in modules.items():
        module.load_state_dict({key: tensors[f"{name}.{key}"] for key in module.state_dict()})
    states = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            states.setdefault(int(number), {})[key] = tensor.clone()
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def versions():
    """Versions of Python and of the packages that can change a result, for the provenance of every file."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "tokenizers", "numpy")}
    return {"python": platform.python_version(), **packages}
