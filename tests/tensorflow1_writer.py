"""Writes TensorFlow 1 checkpoints for the tests, without TensorFlow."""

from pathlib import Path

from checkpoints.tensorflow1 import MAGIC, crc32c


def write_tensorflow(prefix, tensors):
    """Write a checkpoint of {published name: tensor}, in the format that checkpoints/tensorflow1.py describes."""

    def varint(number):
        low = bytes([number & 127 | (128 if number > 127 else 0)])
        return low + (varint(number >> 7) if number > 127 else b"")

    def field(number, value):
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        return varint(number << 3 | 2) + varint(len(value)) + value

    def block(entries):
        body = b"".join(varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in entries)
        body += bytes(4) + (1).to_bytes(4, "little") + bytes(1)
        return body + crc32c(body).to_bytes(4, "little")

    entries, offset = [], 0
    with open(f"{prefix}.data-00000-of-00001", "wb") as file:
        for name, tensor in tensors.items():
            name = name.replace("layer.", "layer_").replace("LayerNorm.weight", "LayerNorm.gamma").replace(".", "/")
            if name.endswith("_embeddings/weight"):
                name = name.removesuffix("/weight")
            elif tensor.dim() == 2:
                name, tensor = name.replace("/weight", "/kernel"), tensor.t()
            file.write(tensor.contiguous().numpy())
            shape = b"".join(field(2, field(1, size)) for size in tensor.shape)
            place = field(4, offset) + field(5, tensor.numel() * 4)
            entries.append((name.encode(), field(1, 1) + field(2, shape) + place))
            offset += tensor.numel() * 4
    content = block([(b"", field(1, 1)), *sorted(entries)])
    where = varint(0) + varint(len(content) - 5)
    index, empty = block([(b"~", where)]), block([])
    footer = varint(len(content)) + varint(len(empty) - 5) + varint(len(content) + len(empty)) + varint(len(index) - 5)
    footer = footer.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")
    Path(f"{prefix}.index").write_bytes(content + empty + index + footer)
