"""How a file was made, whether it is up to date, and the state from which an interrupted run resumes."""

import importlib.metadata
import json
import os
import platform

from checkpoints.safetensors import read_with_metadata
from runtime.cli import BadInput
from runtime.files import read_json


def is_up_to_date(path, provenance, overwrite, elsewhere="another --output"):
    """Whether the file at `path` was made with exactly the settings `made_by`, so that it need not be made again.

    Where it was made with others, or cannot be read, it is removed if it may be overwritten; else raises BadInput with
    `elsewhere` as the other remedy. Models, corpus and task count by their sha256, not by how their paths are spelled.
    """
    if not os.path.exists(path):
        return False
    try:
        metadata = read_json(path) if str(path).endswith(".json") else read_with_metadata(path)[1]
        if not isinstance(metadata, dict) or not isinstance(metadata.get("settings"), dict):
            raise BadInput(f"{path} does not say how it was made")
    except BadInput as error:
        if not overwrite:
            raise BadInput(f"{error}: --overwrite, or {elsewhere}") from None
        metadata = {"settings": {}}
    provenance = json.loads(json.dumps(provenance))
    counts = [key for key in provenance if key.endswith("sha256") or key == "config"]
    differs = [f"another {key}" for key in counts if metadata.get(key) != provenance[key]]
    old, new = metadata["settings"], provenance["settings"]
    named = ("model", "corpus", "objective", "task", "revision", "data_revision")
    compared = [key for key in new if key not in named]
    differs += [f"{key} {old.get(key)!r}, not {new[key]!r}" for key in compared if old.get(key) != new[key]]
    if not differs:
        return True
    if not overwrite:
        raise BadInput(f"{path} was made with other settings ({', '.join(differs)}): --overwrite, or {elsewhere}")
    os.remove(path)
    return False


def load_checkpoint(path, provenance, overwrite):
    """(tensors, notes) of a killed run's state, where `made_before` finds one of these settings; else ({}, {})."""
    if not is_up_to_date(path, provenance, overwrite):
        return {}, {}
    tensors, metadata = read_with_metadata(path)
    return dict(tensors), metadata


def training_state(optimizer, **modules):
    """What a killed run needs to go on: {name: tensor} of the modules' and of the optimizer's state."""
    tensors = {
        f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()
    }
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": tensor for key, tensor in state.items()}
    return tensors


def restore_state(tensors, optimizer, **modules):
    """Put what `training_state` took back in place."""
    for name, module in modules.items():
        module.load_state_dict({key: tensors[f"{name}.{key}"] for key in module.state_dict()})
    states = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            states.setdefault(int(number), {})[key] = tensor.clone()
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def versions():
    """Of what can change a number: written into everything that a script makes."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "tokenizers", "numpy")}
    return {"python": platform.python_version(), **packages}
