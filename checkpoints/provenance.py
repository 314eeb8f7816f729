"""How a file was made, whether it is up to date, and the state from which an interrupted run resumes."""

import importlib.metadata
import json
import os
import platform

from checkpoints import safetensors
from runtime import distributed
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
        metadata = read_json(path) if str(path).endswith(".json") else safetensors.read_with_metadata(path)[1]
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


class Checkpoint:
    """The state of an unfinished run in one safetensors file. A rerun with the same provenance resumes from it.

    tensors, metadata: what the file holds, in every process; both empty if there is no such file. Raises BadInput if
    another run's state is there and may not be overwritten.
    """

    def __init__(self, path, provenance, overwrite):
        self.path, self.provenance = path, provenance
        self.tensors, self.metadata = distributed.broadcast_from_main(lambda: self.read(overwrite))

    def read(self, overwrite):
        if not is_up_to_date(self.path, self.provenance, overwrite):
            return {}, {}
        tensors, metadata = safetensors.read_with_metadata(self.path)
        return dict(tensors), metadata

    def load(self, optimizer, **modules):
        """Put the saved state, if there is one, into the optimizer and the modules."""
        if self.tensors:
            for name, module in modules.items():
                module.load_state_dict({key: self.tensors[f"{name}.{key}"] for key in module.state_dict()})
            states = {}
            for name, tensor in self.tensors.items():
                if name.startswith("optimizer."):
                    _, number, key = name.split(".")
                    states.setdefault(int(number), {})[key] = tensor.clone()
            optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})

    def save(self, optimizer, modules, tensors={}, metadata={}):
        """Write the state of the optimizer and of the modules {name: module}, and whatever else a rerun needs."""
        if distributed.is_main_process():
            states = {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
            for number, state in optimizer.state_dict()["state"].items():
                states |= {f"optimizer.{number}.{key}": tensor for key, tensor in state.items()}
            safetensors.write_safetensors(self.path, states | tensors, self.provenance | metadata)


def versions():
    """The versions that can change a result: Python's and those of torch, tokenizers and numpy."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "tokenizers", "numpy")}
    return {"python": platform.python_version(), **packages}
