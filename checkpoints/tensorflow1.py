"""Google's TensorFlow 1 checkpoints, read without TensorFlow.

NAME.data-00000-of-00001 holds the values of the variables, little endian, one variable after another. NAME.index says
where each variable is. It is a LevelDB table: sorted keys and their values, in blocks.

    file    block block ... block | index block | footer
    footer  handle of the metaindex block (empty) | handle of the index block | zeros up to 40 bytes | MAGIC, 8 bytes
    handle  offset and length as varints: seven bits per byte, the lowest first; the top bit is set if more follow
    block   entry entry ... | restart points, 4 bytes each, and their number | compression, 1 byte | CRC-32C, 4 bytes
    entry   three varints: the bytes kept of the previous key, the new bytes of the key, the bytes of the value;
            the new bytes of the key; the value

The values of the index block are the handles of the other blocks. Their keys are the variables' names, and their values
are protocol buffers, BundleEntryProto {1: dtype, 2: shape {2: dimension {1: size}}, 3: data file, 4: offset, 5: length,
7: slices}. The first key is empty: its value is a BundleHeaderProto {1: number of data files, 2: 1 if big endian}.
"""

import io
import math
import mmap
import os
import re

import torch

from checkpoints.safetensors import MappedTensors
from runtime.cli import BadInput, one_line

MAGIC = 0xDB4775248B80FB57
DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}
KINDS = ("/kernel", "/bias", "/gamma", "/beta", "_embeddings", "output_weights", "output_bias")  # names of weights


def read_tensorflow(index):
    """MappedTensors of a checkpoint, given its .index, under the names of the same model in PyTorch.

    An optimizer's variables are left out. The checksums of the index are verified, those of the values are not: that
    would take minutes in Python. Raises BadInput for a checkpoint that is damaged or incomplete.
    """
    tensors, stem = MappedTensors(), str(index).removesuffix(".index")
    try:
        with open(index, "rb") as file:
            variables = {key.decode(): protobuf(value) for key, value in table(file.read()).items()}
        header = variables.pop("")
        count = header[1][0]
        for path in (f"{stem}.data-{i:05}-of-{count:05}" for i in range(count)):
            if not os.path.isfile(path):
                raise BadInput(f"{path} is missing: {index} needs it")
            with open(path, "rb") as file:
                tensors.files.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        for name, entry in variables.items():
            dtype = DTYPES.get(entry[1][0])
            if dtype is None or not name.endswith(KINDS):
                continue
            shape = [protobuf(size).get(1, [0])[0] for size in protobuf(entry.get(2, [b""])[0]).get(2, [])]
            file, offset, length = tensors.files[entry.get(3, [0])[0]], entry.get(4, [0])[0], entry[5][0]
            if 2 in header or 7 in entry or length != math.prod(shape) * dtype.itemsize or offset + length > len(file):
                raise ValueError(f"{name} of shape {shape} does not fit at {offset} of {len(file)} bytes")
            tensor = torch.frombuffer(file, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
            tensors[in_pytorch(name)] = tensor.t() if name.endswith("/kernel") else tensor
    except (ValueError, IndexError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise BadInput(f"{index} is not a valid TensorFlow checkpoint: {one_line(error)}") from None
    return tensors


def in_pytorch(name):
    """bert/encoder/layer_0/output/dense/kernel -> bert.encoder.layer.0.output.dense.weight."""
    *scopes, last = re.sub(r"/layer_(\d+)/", r"/layer/\1/", name).split("/")
    if last.endswith("_embeddings"):
        scopes, last = [*scopes, last], "weight"
    last = {"kernel": "weight", "output_weights": "weight", "output_bias": "bias"}.get(last, last)
    return ".".join([*(scopes or ["classifier"]), last])  # the variables of run_classifier.py have no scope


def table(data):
    """{key: value} of a LevelDB table."""
    if int.from_bytes(data[-8:], "little") != MAGIC:
        raise ValueError("not a table: its last bytes are not the magic number")
    footer = io.BytesIO(data[-48:])
    _, _, *where = (varint(footer) for _ in range(4))
    handles = map(io.BytesIO, block(data, *where).values())
    blocks = [block(data, varint(handle), varint(handle)) for handle in handles]
    return {key: value for entries in blocks for key, value in entries.items()}


def block(data, offset, length):
    """{key: value} of one block."""
    content, compression, crc = (data[offset:][:n] for n in (length, length + 1, length + 5))
    if len(crc) < 5 or crc32c(compression) != int.from_bytes(crc[-4:], "little") or compression[-1]:
        raise ValueError(f"no uncompressed block with its checksum at {offset}")
    entries, key, file = {}, b"", io.BytesIO(content)
    while file.tell() < length - 4 - 4 * int.from_bytes(content[-4:], "little"):
        kept, new, size = (varint(file) for _ in range(3))
        key = key[:kept] + file.read(new)
        entries[key] = file.read(size)
    return entries


def varint(file):
    """The next integer of an open file."""
    number = shift = 0
    while (byte := file.read(1)[0]) >= 128:
        number |= (byte & 127) << shift
        shift += 7
    return number | byte << shift


def protobuf(data):
    """{field number: [values]} of a protocol buffer: varints as integers, everything else as bytes."""
    fields, file = {}, io.BytesIO(data)
    while file.tell() < len(data):
        number, kind = divmod(varint(file), 8)
        if kind == 0:
            value = varint(file)
        else:  # 8 bytes, 4 bytes, or the length that precedes the value
            value = file.read({1: 8, 5: 4}.get(kind) or varint(file))
        fields.setdefault(number, []).append(value)
    return fields


def crc32c(data):
    """The CRC-32C of `data`, masked as LevelDB stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
