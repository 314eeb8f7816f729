"""Published models: config.json, the files of the weights, PyTorch's .bin, and the names of the tensors in `bert.py`.

Not here: HDF5 (tf_model.h5), Flax, ONNX.
"""

import hashlib
import os
import pickle
import re
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path, PureWindowsPath

import torch

from checkpoints import cache
from checkpoints.safetensors import MappedTensors, read_safetensors
from checkpoints.tensorflow1 import read_tensorflow
from runtime.cli import BadInput, one_line
from runtime.files import atomic_write, read_json, sha256, write_json

SUPPORTED = {
    "model_type": ("bert", "roberta"),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False, None),
}


def read_config(path, sizes):
    """{name: value} of the configuration of the model at `path`: its model_type, and those of `sizes` that it has.

    path: a model folder, or a file of its weights. sizes: {name: type}. Raises BadInput if bert.py cannot run it.
    """
    path, config = config_json(path)
    for name, supported in SUPPORTED.items():
        if config.get(name, supported[0]) not in supported:
            raise BadInput(f"{path} has {name} {config[name]!r}; bert.py runs {' and '.join(map(repr, supported))}")
    if config.get("model_type") == "roberta":
        config.setdefault("pad_token_id", 1)
    found = {name: config[name] for name in ("model_type", *sizes) if name in config}
    for name, kind in sizes.items():
        least = 1 if kind is int and name != "pad_token_id" else 0
        most = 1 if name.endswith("dropout_prob") else 2**24
        if name in found and (type(found[name]) not in (int, kind) or not least <= found[name] < most):
            raise BadInput(f"{path}: {name} {found[name]!r} is not a valid value")
    return found


def config_json(path):
    """(path, content) of config.json, or of bert_config.json as Google names it, of the model at `path`."""
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    for path in (folder / "config.json", folder / "bert_config.json"):
        if path.is_file():
            return path, read_json(path)
    raise BadInput(f"{folder} has no config.json beside its weights")


def label_names(path):
    """The names of the classes of the model at `path`, in order; () if its configuration has none."""
    names = config_json(path)[1].get("id2label")
    names = names if isinstance(names, dict) else {}
    return tuple(str(names.get(str(i), "")) for i in range(len(names)))


def write_config(folder, config, labels):
    """Write config.json of a classifier, with transformers' names. config: a Config as a dictionary."""
    family = {"bert": "Bert", "roberta": "Roberta"}[config["model_type"]]
    config = {name: value for name, value in config.items() if name not in ("num_labels", "heads", "neurons")}
    config |= {
        "architectures": [f"{family}ForSequenceClassification"],
        "hidden_act": "gelu",
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    write_json(os.path.join(folder, "config.json"), config)


# names of the weights in a model folder, in the order of preference
PATTERNS = (
    "model.safetensors",
    "model.safetensors.index.json",  # of several files (shards)
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "*.index",  # TensorFlow's bert_model.ckpt.index, model.ckpt-1000000.index, ...
    "*.safetensors",
    "*.bin",
)
LARGEST_ARCHIVE = 2**34  # bytes unpacked, ten times the largest BERT


def weight_files(path):
    """The files with the weights of a model; an index of several files comes first.

    path: a model folder, or one file of the weights; of TensorFlow's, also bert_model.ckpt, the stem of their names.
    Raises BadInput if there is none, if a shard is missing, or if a folder has several of equal preference.
    """
    path = Path(path)
    if path.is_dir():
        found = next((files for pattern in PATTERNS if (files := sorted(path.glob(pattern)))), [])
        latest = path / "checkpoint"  # TensorFlow writes the name of the last checkpoint there
        if len(found) > 1 and latest.is_file():
            named = re.search(r'^model_checkpoint_path: "(.+)"', latest.read_text("utf8", errors="replace"))
            found = [file for file in found if named and file.name == f"{Path(named[1]).name}.index"] or found
    else:
        found = [file for file in (path, Path(f"{path}.index")) if file.is_file()]
    if not found:
        raise BadInput(f"{path} has no weights: add model.safetensors, pytorch_model.bin or bert_model.ckpt.index")
    if len(found) > 1:
        raise BadInput(f"{path} has several weights, {', '.join(f.name for f in found[:4])}: give one of these files")
    first = found[0]
    if first.suffix == ".json":
        parts = [first.parent / name for name in shards(first)]
        for part in parts:
            if not part.is_file():
                raise BadInput(f"{first} names a file {part.name!r}, which is not a file beside it")
        return [first, *parts]
    if first.suffix == ".index":
        return [first, *sorted(first.parent.glob(f"{first.stem}.data-*"))]
    return found


def shards(index):
    """The names of the files beside an index of shards, {"weight_map": {tensor name: file name}}."""
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise BadInput(f"{index} has no weight_map, so it does not say where the tensors are")
    for name in entries.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise BadInput(f"{index} names a file {name!r}, which is not a file beside it")
    return sorted(set(entries.values()))


def read_weights(path):
    """Mapped {published name: tensor} of the model at `path`, in any of the formats."""
    first, *parts = weight_files(path)
    if first.suffix == ".index":
        return read_tensorflow(first)
    if first.suffix != ".json":
        return read_file(first)
    tensors = MappedTensors()
    for shard in map(read_file, parts):
        tensors |= shard
        tensors.files += shard.files
    return tensors


def read_file(path):
    """Mapped {published name: tensor} of a .bin or safetensors file."""
    return read_bin(path) if path.suffix == ".bin" else read_safetensors(path)[0]


def weights_sha256(path):
    """The sha256 of a model's weights; of several files, that of their concatenated sha256."""
    digests = [sha256(file) for file in weight_files(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def unpack(archive):
    """The folder of a zip archive like Google's uncased_L-12_H-768_A-12.zip, unpacked once into the cache.

    Raises BadInput for an archive that is damaged or too large, or has a path that leads out of the folder.
    """

    def extract(folder):
        shutil.rmtree(folder, ignore_errors=True)  # if it is damaged
        try:
            with zipfile.ZipFile(archive) as archived, atomic_write(folder) as tmp_path:
                for path in map(PureWindowsPath, archived.namelist()):  # splits at / and \
                    if path.anchor or ".." in path.parts:
                        raise BadInput(f"{archive} has a file {str(path)!r}, which leads out of its folder")
                if sum(member.file_size for member in archived.infolist()) > LARGEST_ARCHIVE:
                    raise BadInput(f"{archive} claims to hold more than {LARGEST_ARCHIVE:,} bytes")
                archived.extractall(tmp_path)
        except BadInput:
            raise
        except Exception as error:  # zipfile raises many types of exception for a damaged archive
            raise BadInput(f"{archive} is not a valid zip archive: {one_line(error)}") from None

    def intact(folder):
        with zipfile.ZipFile(archive) as archived:
            for member in archived.infolist():
                path = folder / member.filename
                if not member.is_dir() and not (path.is_file() and crc32(path) == member.CRC):
                    raise BadInput(f"{path} is damaged")
        return folder

    folder = cache.get(cache.folder() / "unpacked" / sha256(archive), intact, extract)
    configs = [path for path in folder.rglob("*") if path.name in ("config.json", "bert_config.json")]
    return min(configs, key=lambda path: (len(path.parts), path)).parent if configs else folder


def crc32(path):
    """The checksum of a file as zip archives store it."""
    found = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            found = zlib.crc32(chunk, found)
    return found


def read_bin(path):
    """Mapped {name: tensor} of a PyTorch .bin: a zip archive, which is memory-mapped, or the older format.

    Only tensors are unpickled. A pickle that would run code is refused, and none of it runs.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        raise BadInput(f"{path} does not only hold tensors: damaged, or a pickle that would run code") from None
    except Exception as error:  # the unpickler raises many types of exception for a damaged file
        raise BadInput(f"{path} is not a valid PyTorch checkpoint: {one_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise BadInput(f"{path} does not hold named tensors")
    for name, tensor in tensors.items():
        is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise BadInput(f"{path}: {name} is not a valid tensor")
    return MappedTensors(tensors)


# published name -> name in bert.py; {} is the layer's number
ENCODER = {
    "embeddings.word_embeddings": "word_embeddings",
    "embeddings.position_embeddings": "position_embeddings",
    "embeddings.token_type_embeddings": "segment_embeddings",
    "embeddings.LayerNorm": "embedding_norm",
    "encoder.layer.{}.attention.output.dense": "layers.{}.attention_output",
    "encoder.layer.{}.attention.output.LayerNorm": "layers.{}.attention_norm",
    "encoder.layer.{}.intermediate.dense": "layers.{}.intermediate",
    "encoder.layer.{}.output.dense": "layers.{}.output",
    "encoder.layer.{}.output.LayerNorm": "layers.{}.output_norm",
}
HEADS = {
    "bert": {
        "pooler.dense": "pooler",
        "cls.predictions.transform.dense": "mlm_head.dense",
        "cls.predictions.transform.LayerNorm": "mlm_head.norm",
        "cls.predictions": "mlm_head",
        "cls.predictions.decoder": "mlm_head.decoder",
        "classifier": "classifier",
    },
    "roberta": {  # the pooler belongs to its classifier
        "classifier.dense": "pooler",
        "lm_head.dense": "mlm_head.dense",
        "lm_head.layer_norm": "mlm_head.norm",
        "lm_head": "mlm_head",
        "lm_head.decoder": "mlm_head.decoder",
        "classifier.out_proj": "classifier",
    },
}
PARTS = ("query", "key", "value")  # three published tensors, one in bert.py
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # old versions of transformers saved these
LAYER = re.compile(r"(?<=\.layer\.)\d+")


def from_huggingface(tensors, model_type, layers, path):
    """Published tensors -> ({bert.py's name: float32 tensor}, [names of tensors that bert.py does not use]).

    The prefix `bert.` or `roberta.` is optional; query, key and value are concatenated. Raises BadInput for a tensor of
    the encoder that is missing, that is not floating-point, or that the configuration has no place for. path: for the
    message.
    """
    names, found, unused = ENCODER | HEADS[model_type], {}, []
    bare = {name.removeprefix(f"{model_type}."): tensor for name, tensor in tensors.items()}
    for name, tensor in bare.items():
        if name.startswith(("embeddings.", "encoder.")) and not (tensor.is_floating_point() or name in BUFFERS):
            raise BadInput(f"{path}: {name} has dtype {tensor.dtype}, which is not floating-point")
    for i in range(layers):
        for kind, dimensions in (("weight", 2), ("bias", 1)):
            parts = [f"encoder.layer.{i}.attention.self.{part}.{kind}" for part in PARTS]
            for name in [*parts, f"encoder.layer.{i}.intermediate.dense.{kind}"]:
                if name not in bare:
                    raise BadInput(f"{path} has no tensor {name}")
                if bare[name].dim() != dimensions or name in parts and bare[name].shape != bare[parts[0]].shape:
                    raise BadInput(f"{path}: {name} has shape {tuple(bare[name].shape)}, which fits no model")
            found[f"layers.{i}.query_key_value.{kind}"] = torch.cat([bare.pop(name).float() for name in parts])
    for name, tensor in bare.items():
        stem, _, kind = name.rpartition(".")
        number = LAYER.search(stem)
        ours = names.get(LAYER.sub("{}", stem))
        if ours and (number is None or int(number[0]) < layers):
            kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)  # LayerNorm in TensorFlow
            found[f"{ours.format(number and number[0])}.{kind}"] = tensor.float()
        elif name.startswith(("embeddings.", "encoder.")) and name not in BUFFERS:
            raise BadInput(f"{path} has a tensor {name}, for which its configuration has no place")
        elif name not in BUFFERS:
            unused.append(name)
    bias = found.pop("mlm_head.decoder.bias", None)  # equal to mlm_head.bias; many files have both
    if bias is not None:
        found.setdefault("mlm_head.bias", bias)
    return found, unused


def layer_widths(tensors, config, path):
    """(heads, neurons) of each layer, from the shapes of the tensors of `from_huggingface`.

    Raises BadInput if they exceed the configuration's.
    """
    layers = range(config.num_hidden_layers)
    heads = tuple(len(tensors[f"layers.{i}.query_key_value.bias"]) // (3 * config.head_size) for i in layers)
    neurons = tuple(len(tensors[f"layers.{i}.intermediate.bias"]) for i in layers)
    if max(heads) > config.num_attention_heads or max(neurons) > config.intermediate_size:
        raise BadInput(f"{path} has layers wider than its configuration: {max(heads)} heads, {max(neurons)} neurons")
    return heads, neurons


def missing_modules(tensors, expected, path):
    """Names of the heads (mlm_head, pooler, classifier) that are not complete in the tensors of `from_huggingface`.

    expected: {name: shape} of the model. Raises BadInput for a tensor of the encoder that is missing, and for any
    tensor with a different shape.
    """
    for name, shape in expected.items():
        if name not in tensors and not name.startswith(("mlm_head.", "classifier.", "pooler.")):
            raise BadInput(f"{path} has no tensor for {name}")
        if name in tensors and tensors[name].shape != shape:
            found = tuple(tensors[name].shape)
            raise BadInput(f"{path}: {name} has shape {found}, its configuration says {tuple(shape)}")
    return sorted({name.split(".")[0] for name in expected if name not in tensors})


def to_huggingface(state, model_type):
    """{bert.py's name: tensor} -> {published name: tensor}, the inverse of `from_huggingface`."""
    published_names = {ours: published for published, ours in (ENCODER | HEADS[model_type]).items()}
    tensors = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        number = re.search(r"\d+", stem)
        number = number and number[0]
        if stem.endswith("query_key_value"):
            for part, chunk in zip(PARTS, tensor.chunk(3)):
                tensors[f"{model_type}.encoder.layer.{number}.attention.self.{part}.{kind}"] = chunk
        else:
            published = published_names[re.sub(r"\d+", "{}", stem)].format(number)
            prefix = "" if published.startswith(("cls.", "lm_head", "classifier")) else f"{model_type}."
            tensors[f"{prefix}{published}.{kind}"] = tensor
    return tensors


def load_report(model):
    """Lines for the user: which modules of a loaded Bert are newly initialized, and which tensors are not used.

    The MLM head is left out: search.py fits it, and reports that.
    """
    initialized = [name for name in model.initialized if name != "mlm_head"]
    unused = sorted({name.rpartition(".")[0] or name for name in model.unused})
    if len(unused) > 6:
        unused[6:] = [f"{len(unused) - 6} more"]
    lines = {"newly initialized": initialized, "not used": unused}
    return [f"{what}: {', '.join(names)}" for what, names in lines.items() if names]
