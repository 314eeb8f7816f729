"""How a file was made, whether it is up to date, and the state from which an interrupted run resumes."""

import ast
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import json
import modulefinder
import os
import platform
from datetime import datetime
from pathlib import Path

from checkpoints import safetensors
from runtime import distributed
from runtime.cli import BadInput, first_few
from runtime.files import model_folder, read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("model", "corpus", "objective", "revision", "data_revision")  # their content is identified by a sha256


class ModuleFinder(modulefinder.ModuleFinder):
    """Finds the project's modules. A folder without __init__.py, such as one named csv, is no module."""

    def find_module(self, name, path, parent=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path or self.path)
        if spec and spec.origin is None:
            raise ImportError(name)
        return super().find_module(name, path, parent)


def software(*scripts):
    """The "code" and "versions" of a provenance: {file: digest} of the scripts at these paths and of the project's
    files that they import, directly or indirectly; {package: version}."""
    finder = ModuleFinder([str(ROOT)])
    for script in scripts:
        finder.load_file(str(script))
    paths = sorted(Path(module.__file__).resolve() for module in finder.modules.values() if module.__file__)
    code = {path.relative_to(ROOT).as_posix(): code_digest(path, path.stat().st_mtime_ns) for path in paths}
    return {"code": code, "versions": versions()}


@functools.cache
def code_digest(path, changed):
    """The digest of a Python file without comments, docstrings and formatting. changed: the time of the last change."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def versions():
    """The versions that can change a result: Python's and those of torch, tokenizers and numpy."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "tokenizers", "numpy")}
    return {"python": platform.python_version(), **packages}


def write_result(path, value):
    """Write a dictionary as JSON with its checksum, for `read_result`."""
    write_json(path, value | {"checksum": json_sha256(value)})


def read_result(path):
    """The dictionary that `write_result` wrote. Raises BadInput if the file is damaged or has no checksum."""
    value = read_json(path)
    if value.pop("checksum", None) != json_sha256(value):
        raise BadInput(f"{path} is damaged, or has no checksum: restore a copy, or make it again")
    return value


def json_sha256(value):
    """The sha256 of a value as JSON with sorted keys."""
    value = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def identity(provenance):
    """The part of a provenance that decides whether two files have the same content."""
    kept = ("script", "code", "config")
    found = {key: value for key, value in provenance.items() if key in kept or key.endswith("sha256")}
    names = (*NAMES, "task") if "task_sha256" in provenance else NAMES
    settings = {key: value for key, value in provenance["settings"].items() if key not in names}
    return json.loads(json.dumps(found | {"settings": settings}))


def without_paths(settings):
    """Settings for a file to be shared: of the paths of model, corpus and task, only the last name is kept."""
    model = Path(settings["model"])
    if model.is_absolute() or model.exists() or model.with_name(f"{model.name}.index").is_file():  # TensorFlow's
        settings = settings | {"model": str(model_folder("", model))}
    names = [name for name in ("corpus", "objective", "task") if name in settings]
    return settings | {name: os.path.basename(os.path.abspath(settings[name])) for name in names}


def read_made_by(path, provenance):
    """({name: tensor}, metadata) of a file. A JSON file has no tensors.

    Raises BadInput if the file was not made with this provenance: the message says what differs.
    """
    is_json = str(path).endswith(".json")
    tensors, metadata = ({}, read_result(path)) if is_json else safetensors.read_with_metadata(path)
    if not isinstance(metadata.get("settings"), dict):
        raise BadInput(f"{path} has no provenance")
    old, new = identity(metadata), identity(provenance)
    settings = differences(old.pop("settings"), new.pop("settings"))
    code = differences(old.pop("code", {}), new.pop("code", {}))
    what = [f"another {key}" for key in differences(old, new)]
    what += [f"{key} {before!r}, not {after!r}" for key, (before, after) in settings.items()]
    reasons = [f"with other settings ({', '.join(what)})"] if what else []
    if code:
        reasons.append(f"by other code ({first_few(code)})")
    if reasons:
        raise BadInput(f"{path} was made {' and '.join(reasons)}")
    return tensors, metadata


def differences(old, new):
    """{key: (value in `old`, value in `new`)} of the keys whose values differ."""
    return {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}


def is_up_to_date(path, provenance, overwrite, elsewhere="another --output"):
    """Whether the file at `path` was made by the same command and code, and can be reused. Prints a line if so.

    `overwrite` removes it, unless it is the state of an unfinished run with `overwrite`, which the same command
    resumes. elsewhere: the alternative to --overwrite, for the message.
    """
    if not os.path.exists(path):
        return False
    try:
        metadata = read_made_by(path, provenance)[1]
    except BadInput as error:
        if not overwrite:
            raise BadInput(f"{error}: use --overwrite or {elsewhere}") from None
        metadata = {}
    if overwrite and not metadata.get("overwrite"):
        os.remove(path)
        return False
    verb, date = "resuming" if "overwrite" in metadata else "reusing", datetime.fromtimestamp(os.path.getmtime(path))
    print(f"{verb} {path}, made by the same command, {date:%Y-%m-%d %H:%M}")
    return True


def note_other_code(path, metadata):
    """Print a line if an input was made by other code than the present: only the script that made it checks that."""
    script = {"robustt.py": "baselines/robustt.py"}.get(metadata["script"], metadata["script"])
    recorded = metadata.get("code")
    if isinstance(recorded, dict) and (changed := differences(recorded, software(ROOT / script)["code"])):
        print(
            f"note: {path} was made by other code ({first_few(changed)}): repeat the command that made it, with "
            "--overwrite, to make it again"
        )


def check_tensors(path, tensors, expected):
    """Raise BadInput unless the tensors of the file have the names, shapes and types of `expected`."""
    kinds = ({name: f"{t.dtype} {tuple(t.shape)}" for name, t in of.items()} for of in (tensors, expected))
    for name, (found, wanted) in differences(*kinds).items():
        raise BadInput(f"{path} belongs to another model: {name} is {found}, not {wanted}: make it again")


def load_module(module, tensors, path):
    """Load the tensors of the file into the module. Raises BadInput if they do not fit."""
    check_tensors(path, tensors, module.state_dict())
    module.load_state_dict(tensors)


class Checkpoint:
    """The state of an unfinished run in one safetensors file. A rerun with the same provenance resumes from it.

    tensors, metadata: what the file holds; both empty if there is no such file. Without a path nothing is saved.
    """

    def __init__(self, path=None, provenance={}, overwrite=False):
        self.path, self.provenance = path, provenance
        # so that a state is never taken for a result
        self.unfinished = provenance | {"script": f"{provenance.get('script')}, unfinished"}
        self.tensors, self.metadata = distributed.broadcast_from_main(lambda: self.read(overwrite))
        self.overwrite = self.metadata.get("overwrite", overwrite)

    def read(self, overwrite):
        if self.path is None or not is_up_to_date(self.path, self.unfinished, overwrite):
            return {}, {}
        tensors, metadata = safetensors.read_with_metadata(self.path)
        return dict(tensors), metadata

    def load(self, optimizer, **modules):
        """Load the saved state, if there is one, into the optimizer and the modules. Returns its other tensors."""
        if not self.tensors:
            return {}
        saved, self.tensors = self.tensors, {}  # everything is copied: Windows cannot replace a mapped file

        def part(prefix):
            return {name.removeprefix(prefix): saved[name] for name in saved if name.startswith(prefix)}

        for name, module in modules.items():
            load_module(module, part(f"{name}."), self.path)
        states = {}
        for name, tensor in part("optimizer.").items():
            number, _, key = name.partition(".")
            states.setdefault(int(number), {})[key] = tensor.clone()
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        return {name: saved[name].clone() for name in saved if name.partition(".")[0] not in ("optimizer", *modules)}

    def save(self, optimizer, modules, tensors={}, metadata={}):
        """Write the state of the optimizer and of the modules {name: module}, and whatever else a rerun needs."""
        if self.path and distributed.is_main_process():
            states = {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
            for number, state in optimizer.state_dict()["state"].items():
                states |= {f"optimizer.{number}.{key}": tensor for key, tensor in state.items()}
            metadata = self.unfinished | {"overwrite": self.overwrite} | metadata
            safetensors.write_safetensors(self.path, states | tensors, metadata)
