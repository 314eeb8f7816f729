"""The format of everything that this project writes, safetensors, by hand; how each file was made goes into it.

safetensors is 8 bytes that give the header's length (little endian), a JSON header
{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {"key": "text"}} and the
tensors' bytes one after another. Nothing in it can run code, and a tensor is a view of the file.
"""

import hashlib
import json
import math
import mmap
import os

import torch

from runtime import BadInput, read_json, replacing

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LONGEST_HEADER = 100_000_000  # bytes; the reference implementation's own limit


class Mapped(dict):
    """{name: tensor}: views of memory-mapped files, from which nothing is read before it is touched. Writing to one
    leaves the file as it is (a private mapping)."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.files = []

    def release(self):
        """Give back the memory of what was read so far; also forgets what was written to the tensors."""
        for file in self.files:
            file.madvise(mmap.MADV_DONTNEED)


def map_file(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def read_safetensors(path):
    """(Mapped {name: tensor}, {metadata}) of a safetensors file.

    Raises BadInput for anything but a well-formed file: sizes that lie, overlap, leave holes or end elsewhere than the
    file does, as the reference implementation refuses them.
    """

    def bad(reason):
        return BadInput(f"{path} is not a whole safetensors file: {reason}")

    if not os.path.isfile(path):
        raise BadInput(f"{path} is not there")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise bad(f"{size} bytes")
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, LONGEST_HEADER):
            raise bad(f"its header claims {length} of {size} bytes")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            entries = [(e["data_offsets"], name, e["dtype"], e["shape"]) for name, e in header.items()]
            entries.sort()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise bad(f"header: {type(error).__name__} {error}") from None
    tensors, mapped, start = Mapped(), map_file(path), 8 + length
    tensors.files.append(mapped)
    for offsets, name, dtype, shape in entries:
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise bad(f"{name} has dtype {dtype!r}, known are {', '.join(DTYPES)}")
        if not (isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**63 for n in shape)):
            raise bad(f"{name} has shape {shape}")
        count = math.prod(shape)
        end = start + count * DTYPES[dtype].itemsize
        if offsets != [start - 8 - length, end - 8 - length] or end > size:
            raise bad(f"{name} claims bytes {offsets}, where {[start - 8 - length, end - 8 - length]} must stand")
        flat = torch.frombuffer(mapped, dtype=DTYPES[dtype], count=count, offset=start) if count else torch.empty(0)
        tensors[name] = flat.to(DTYPES[dtype]).view(shape)
        start = end
    if start != size:
        raise bad(f"{size - start} bytes too many")
    return tensors, metadata


def write_safetensors(path, tensors, notes):
    """Write {name: tensor} and the `notes`, JSON values that say how the file was made, by way of a temporary file."""
    metadata = {"format": "pt"} | {key: json.dumps(value, sort_keys=True) for key, value in notes.items()}
    header, offset = {"__metadata__": metadata}, 0  # transformers reads no file without a format
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensors aligned to 8 bytes
    with replacing(path) as beside, open(beside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def read_notes(path):
    """(tensors, notes) of a file that `write_safetensors` wrote; raises BadInput where another program wrote it."""
    tensors, metadata = read_safetensors(path)
    try:
        return tensors, {key: json.loads(value) for key, value in metadata.items() if key != "format"}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"{path} was not written by this project: its notes cannot be read") from None


def made_before(path, made_by, overwrite, elsewhere="another --output"):
    """Whether the file at `path` was made with exactly the settings `made_by`, so that it need not be made again.

    Where it was made with others, or cannot be read, it is removed if it may be overwritten; else raises BadInput with
    `elsewhere` as the other remedy. Models, corpus and task count by their sha256, not by how their paths are spelled.
    """
    if not os.path.exists(path):
        return False
    try:
        notes = read_json(path) if str(path).endswith(".json") else read_notes(path)[1]
        if not isinstance(notes, dict) or not isinstance(notes.get("settings"), dict):
            raise BadInput(f"{path} does not say how it was made")
    except BadInput as error:
        if not overwrite:
            raise BadInput(f"{error}: --overwrite, or {elsewhere}") from None
        notes = {"settings": {}}
    made_by = json.loads(json.dumps(made_by))
    counts = [key for key in made_by if key.endswith("sha256") or key == "config"]
    differs = [f"another {key}" for key in counts if notes.get(key) != made_by[key]]
    old, new = notes["settings"], made_by["settings"]
    named = ("model", "corpus", "source", "task", "revision", "data_revision")
    compared = [key for key in new if key not in named]
    differs += [f"{key} {old.get(key)!r}, not {new[key]!r}" for key in compared if old.get(key) != new[key]]
    if not differs:
        return True
    if not overwrite:
        raise BadInput(f"{path} was made with other settings ({', '.join(differs)}): --overwrite, or {elsewhere}")
    os.remove(path)
    return False


def resumed(path, made_by, overwrite):
    """(tensors, notes) of a killed run's state, where `made_before` finds one of these settings; else ({}, {})."""
    if not made_before(path, made_by, overwrite):
        return {}, {}
    tensors, notes = read_notes(path)
    return dict(tensors), notes


def training_state(optimizer, **modules):
    """What a killed run needs to go on: {name: tensor} of the modules' and of the optimizer's state."""
    tensors = {
        f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()
    }
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": tensor for key, tensor in state.items()}
    return tensors


def restore(tensors, optimizer, **modules):
    """Put what `training_state` took back in place."""
    for name, module in modules.items():
        module.load_state_dict({key: tensors[f"{name}.{key}"] for key in module.state_dict()})
    states = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            states.setdefault(int(number), {})[key] = tensor.clone()
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
