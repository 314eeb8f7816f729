"""The format of everything that this project writes, safetensors, by hand; how each file was made goes into it.

safetensors is 8 bytes that give the header's length (little endian), a JSON header
{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {"key": "text"}} and the
tensors' bytes one after another. Nothing in it can run code, and a tensor is a view of the file.
"""

import json
import math
import mmap
import os

import torch

from runtime.cli import BadInput
from runtime.files import atomic_write

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


class MappedTensors(dict):
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
    tensors, mapped, start = MappedTensors(), map_file(path), 8 + length
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


def write_safetensors(path, tensors, metadata):
    """Write {name: tensor} and the `notes`, JSON values that say how the file was made, by way of a temporary file."""
    metadata = {"format": "pt"} | {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    header, offset = {"__metadata__": metadata}, 0  # transformers reads no file without a format
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensors aligned to 8 bytes
    with atomic_write(path) as tmp_path, open(tmp_path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def read_with_metadata(path):
    """(tensors, notes) of a file that `write_safetensors` wrote; raises BadInput where another program wrote it."""
    tensors, metadata = read_safetensors(path)
    try:
        return tensors, {key: json.loads(value) for key, value in metadata.items() if key != "format"}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"{path} was not written by this project: its notes cannot be read") from None
