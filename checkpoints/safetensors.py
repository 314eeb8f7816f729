"""The safetensors format, in which this project writes all tensors, with metadata that says how they were made.

A file is 8 bytes with the header's length (little endian), a JSON header
{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {"key": "text"}}, and the
tensors' bytes one after another. It cannot run code, and a loaded tensor is a view of the file. This project adds a
checksum to the metadata: the sha256 of the whole file with zeros in place of the checksum.
"""

import hashlib
import json
import math
import mmap
import sys

import torch

from runtime.cli import BadInput, one_line
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
CHECKSUM, NO_CHECKSUM = "orticket_sha256", "0" * 64  # its key in the metadata, and its placeholder while hashing


class MappedTensors(dict):
    """{name: tensor}: views of memory-mapped files, read only when used. Writing to a tensor does not
    change the file (a private mapping)."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.files = []

    def release(self):
        """On Linux, free the memory of what was read so far. This also undoes what was written to the tensors."""
        for file in self.files if sys.platform == "linux" and hasattr(mmap, "MADV_DONTNEED") else ():
            file.madvise(mmap.MADV_DONTNEED)


def read_safetensors(path):
    """(MappedTensors, {metadata}) of a safetensors file. Raises BadInput if it is malformed or its checksum is wrong.

    As in the reference implementation, the tensors must fill the file without overlaps or holes.
    """
    with open(path, "rb") as file:  # opened once: another process may replace it meanwhile
        try:
            tensors, metadata, start = parse(file)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise BadInput(f"{path} is not a valid safetensors file: {one_line(error)}") from None
        if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(file, start, metadata[CHECKSUM]):
            raise BadInput(f"{path} is damaged (wrong checksum): restore a copy, or make it again")
    return tensors, metadata


def parse(file):
    """(MappedTensors, {metadata}, where the header ends) of an open file. Raises various exceptions if it is bad."""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:start])
    metadata = dict(header.pop("__metadata__", {}))
    entries = sorted((e["data_offsets"], name, DTYPES[e["dtype"]], e["shape"]) for name, e in header.items())
    tensors, offset = MappedTensors(), 0
    tensors.files.append(mapped)
    for offsets, name, dtype, shape in entries:
        count = math.prod(shape)
        end = offset + count * dtype.itemsize
        if offsets != [offset, end] or start + end > len(mapped):
            raise ValueError(f"{name} claims bytes {offsets}, not {[offset, end]}")
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + offset) if count else torch.empty(0)
        tensors[name] = flat.to(dtype).view(shape)
        offset = end
    if start + offset != len(mapped):
        raise ValueError(f"{len(mapped)} bytes, not {start + offset}")
    return tensors, metadata, start


def checksum(file, start, found):
    """The checksum of an open file, whose header ends at `start` and has the checksum `found`.

    Does not read the memory mapping, whose pages would count as memory of this process.
    """
    file.seek(0)
    digest = hashlib.sha256(file.read(start).replace(str(found).encode(), NO_CHECKSUM.encode(), 1))
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def write_safetensors(path, tensors, metadata):
    """Write {name: tensor} and the metadata, JSON values that say how the file was made, atomically."""
    values = {key: json.dumps(value, sort_keys=True) for key, value in sorted(metadata.items())}
    metadata = {CHECKSUM: NO_CHECKSUM, "format": "pt"} | values  # transformers requires a format
    header, offset = {"__metadata__": metadata}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns tensors to 8 bytes
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with atomic_write(path) as tmp_path, open(tmp_path, "wb") as file:
        file.write(head)
        for tensor in tensors.values():
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(data)
            file.write(data)
        file.seek(head.index(NO_CHECKSUM.encode()))
        file.write(digest.hexdigest().encode())


def read_with_metadata(path, *scripts):
    """(tensors, metadata) of a file that `write_safetensors` wrote, in one of these scripts if any are given."""
    tensors, metadata = read_safetensors(path)
    if CHECKSUM not in metadata:
        raise BadInput(f"{path} has no checksum: another program or an earlier version wrote it")
    metadata = {key: json.loads(value) for key, value in metadata.items() if key not in (CHECKSUM, "format")}
    if scripts and not (metadata.get("script") in scripts and isinstance(metadata.get("settings"), dict)):
        raise BadInput(f"{path} was not written by {' or '.join(scripts)}")
    return tensors, metadata
