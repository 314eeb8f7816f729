"""Models as their authors publish them: config.json, which files hold the weights, PyTorch's .bin, and the name of
every tensor in `bert.py`'s terms. Neither TensorFlow nor transformers is needed.

Left out: HDF5 (tf_model.h5), Flax, ONNX.
"""

import hashlib
import json
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import filelock
import torch

from checkpoints.safetensors import MappedTensors, read_safetensors
from checkpoints.tensorflow1 import read_tensorflow
from runtime.cli import BadInput, one_line
from runtime.files import atomic_write, cache_folder, read_json, sha256, write_json

# ------------------------------------------------------------------------------------------------- configuration

KNOWN = {
    "model_type": ("bert", "roberta"),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False, None),
}


def read_config(path, sizes):
    """{name: value} of the model at `path`, its folder or a file of its weights: its model_type, and what config.json
    or, as Google names it, bert_config.json says of `sizes`, {name: type}. Raises BadInput where bert.py cannot run it.
    """
    path, config = config_json(path)
    for name, known in KNOWN.items():
        if config.get(name, known[0]) not in known:
            raise BadInput(f"{path} has {name} {config[name]!r}; bert.py runs {' and '.join(map(repr, known))}")
    if config.get("model_type") == "roberta":
        config.setdefault("pad_token_id", 1)
    found = {name: config[name] for name in ("model_type", *sizes) if name in config}
    for name, kind in sizes.items():
        least = 1 if kind is int and name != "pad_token_id" else 0
        most = 1 if name.endswith("dropout_prob") else 2**24
        if name in found and (type(found[name]) not in (int, kind) or not least <= found[name] < most):
            raise BadInput(f"{path}: {name} {found[name]!r} is nothing that a model can have")
    return found


def config_json(path):
    """(path, content) of the configuration of the model at `path`."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path) and os.path.isfile(os.path.join(folder, "bert_config.json")):
        path = os.path.join(folder, "bert_config.json")
    try:
        with open(path, encoding="utf8") as file:
            return path, dict(json.load(file))
    except FileNotFoundError:
        raise BadInput(f"{path} is not there: a model folder holds config.json beside its weights") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{path} is not a model configuration: {error}") from None


def label_names(path):
    """What the configuration of the model at `path` calls its classes, in their order; () where it does not say."""
    names = config_json(path)[1].get("id2label")
    names = names if isinstance(names, dict) else {}
    return tuple(str(names.get(str(i), "")) for i in range(len(names)))


def write_config(folder, config, labels):
    """config.json of a classifier, by transformers' names: `config`, a Config as a dictionary, and the classes."""
    name = {"bert": "Bert", "roberta": "Roberta"}[config["model_type"]]
    config = {k: v for k, v in config.items() if k not in ("num_labels", "heads", "neurons")}
    config |= {"architectures": [f"{name}ForSequenceClassification"], "hidden_act": "gelu"}
    config |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    config |= {"label2id": {name: i for i, name in enumerate(labels)}}
    write_json(os.path.join(folder, "config.json"), config)


# ---------------------------------------------------------------------------------------------- files of a model

# what a model folder may call its weights; the first that is there counts
PATTERNS = (
    "model.safetensors",
    "model.safetensors.index.json",  # says which of several files (shards) has which tensor
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "*.index",  # TensorFlow's bert_model.ckpt.index, model.ckpt-1000000.index, ...
    "*.safetensors",
    "*.bin",
)
LARGEST_ARCHIVE = 2**34  # bytes unpacked; the largest BERT is a tenth of it


def weight_files(path):
    """The files with the weights of a model, given its folder or a file of it; the one to begin with comes first.

    TensorFlow's bert_model.ckpt is the common beginning of several names. Raises BadInput where there is none, where
    a shard is missing, or where a folder has several that none of PATTERNS tells apart.
    """
    path = Path(path)
    if path.is_dir():
        found = next((files for pattern in PATTERNS if (files := sorted(path.glob(pattern)))), [])
        latest = path / "checkpoint"  # TensorFlow's note of the last of many
        if len(found) > 1 and latest.is_file():
            named = re.search(r'^model_checkpoint_path: "(.+)"', latest.read_text("utf8", errors="replace"))
            found = [file for file in found if named and file.name == f"{Path(named[1]).name}.index"] or found
    else:
        found = [file for file in (path, Path(f"{path}.index")) if file.is_file()]
    if not found:
        raise BadInput(
            f"{path} has no weights: model.safetensors, pytorch_model.bin or bert_model.ckpt.index is wanted"
        )
    if len(found) > 1:
        raise BadInput(f"{path} has several weights, {', '.join(f.name for f in found[:4])}: give one of these files")
    first = found[0]
    if first.suffix == ".json":
        parts = [first.parent / name for name in sorted(set(shards(first).values()))]
        for part in parts:
            if not part.is_file():
                raise BadInput(f"{first} names a file {part.name!r}, which is no file beside it")
        return [first, *parts]
    if first.suffix == ".index":
        return [first, *sorted(first.parent.glob(f"{first.stem}.data-*"))]
    return found


def shards(index):
    """{tensor name: file name} of a shards' index, {"weight_map": {...}}; no name may lead out of the folder."""
    entries = read_json(index)
    entries = entries.get("weight_map") if isinstance(entries, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise BadInput(f"{index} has no weight_map: it does not say where the tensors are")
    for name in entries.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise BadInput(f"{index} names a file {name!r}, which is no file beside it")
    return entries


def read_weights(path):
    """Mapped {published name: tensor} of the model at `path`, in whatever format it is."""
    first = weight_files(path)[0]
    if first.suffix == ".index":
        return read_tensorflow(first)
    is_bin = first.suffix == ".bin" or first.name.endswith(".bin.index.json")
    read = read_bin if is_bin else lambda file: read_safetensors(file)[0]
    if first.suffix != ".json":
        return read(first)
    tensors, entries = MappedTensors(), shards(first)
    for file in sorted(set(entries.values())):
        shard = read(first.parent / file)
        tensors.files += shard.files
        for name in (name for name, where in entries.items() if where == file):
            if name not in shard:
                raise BadInput(f"{first} says that {file} has {name}; it has not")
            tensors[name] = shard[name]
    return tensors


def weights_sha256(path):
    """sha256 of a model's weights; of several files, that of their sha256 one after another."""
    digests = [sha256(file) for file in weight_files(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def unpack(archive):
    """The folder with what a zip like Google's uncased_L-12_H-768_A-12.zip holds, unpacked once into the cache.

    Raises BadInput for a damaged archive, one with a name that leads out of the folder, and one that claims too much.
    """
    folder = cache_folder() / "unpacked" / sha256(archive)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):  # of two that want it at once, one unpacks
        if not folder.is_dir():
            try:
                archived = zipfile.ZipFile(archive)
                outside = [name for name in archived.namelist() if is_path_traversal(name)]
                too_large = sum(member.file_size for member in archived.infolist()) > LARGEST_ARCHIVE
                damaged = None if outside or too_large else archived.testzip()
            except Exception as error:  # zipfile raises whatever a damaged archive makes it stumble upon
                raise BadInput(f"{archive} is not a whole zip archive: {one_line(error)}") from None
            with archived, atomic_write(folder) as tmp_path:
                if outside:
                    raise BadInput(f"{archive} has a file {outside[0]!r}, which leads out of it: refused")
                if too_large:
                    raise BadInput(f"{archive} claims to hold more than {LARGEST_ARCHIVE:,} bytes: refused")
                if damaged:
                    raise BadInput(f"{archive} is not a whole zip archive: {damaged} is damaged")
                archived.extractall(tmp_path)
    configs = [path for path in folder.rglob("*") if path.name in ("config.json", "bert_config.json")]
    return min(configs, key=lambda path: (len(path.parts), path)).parent if configs else folder


def is_path_traversal(name):
    """Whether a file of this name in an archive would be unpacked elsewhere than below its folder."""
    parts = re.split(r"[/\\]", name)
    return ".." in parts or parts[0] == "" or ":" in parts[0]


# ------------------------------------------------------------------------------------------------ PyTorch's .bin


def read_bin(path):
    """Mapped {name: tensor} of a PyTorch .bin, be it a zip archive (memory-mapped) or of the format before.

    Only tensors are unpickled: a pickle that would run code is refused, and nothing of it runs.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise BadInput(f"{path} is no checkpoint of tensors alone: damaged, or a pickle that would run code") from None
    except Exception as error:  # the unpickler raises whatever a damaged file makes it stumble upon
        raise BadInput(f"{path} is not a whole PyTorch checkpoint: {one_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise BadInput(f"{path} holds no tensors by name")
    for name, tensor in tensors.items():
        whole = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not whole or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise BadInput(f"{path}: {name} is not a whole tensor")
    return MappedTensors(tensors)


# ------------------------------------------------------------------------------------------------ names of tensors

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
    "roberta": {  # its classifier brings its own pooler
        "classifier.dense": "pooler",
        "lm_head.dense": "mlm_head.dense",
        "lm_head.layer_norm": "mlm_head.norm",
        "lm_head": "mlm_head",
        "lm_head.decoder": "mlm_head.decoder",
        "classifier.out_proj": "classifier",
    },
}
PARTS = ("query", "key", "value")  # three tensors as published, one in bert.py
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # of old versions of transformers; no weights
LAYER = re.compile(r"(?<=\.layer\.)\d+")


def from_huggingface(tensors, model_type, layers, path):
    """Published tensors -> ({bert.py's name: float32 tensor}, [names of those that bert.py has no use for]).

    With or without the prefix `bert.` or `roberta.`; query, key and value become one. Raises BadInput that names a
    tensor of the encoder which is missing, is not floating-point, or for which the configuration has no place.
    `path` is for the message.
    """
    names, found, others = ENCODER | HEADS[model_type], {}, []
    bare = {name.removeprefix(f"{model_type}."): tensor for name, tensor in tensors.items()}
    for name, tensor in bare.items():
        if name.startswith(("embeddings.", "encoder.")) and not (tensor.is_floating_point() or name in BUFFERS):
            raise BadInput(f"{path}: {name} has dtype {tensor.dtype}, not a floating-point one")
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
            kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)  # LayerNorm's names in TensorFlow's days
            found[f"{ours.format(number and number[0])}.{kind}"] = tensor.float()
        elif name.startswith(("embeddings.", "encoder.")) and name not in BUFFERS:
            raise BadInput(f"{path} has a tensor {name}, for which its configuration has no place")
        elif name not in BUFFERS:
            others.append(name)
    bias = found.pop("mlm_head.decoder.bias", None)  # the same as mlm_head.bias, and often there twice
    if bias is not None:
        found.setdefault("mlm_head.bias", bias)
    return found, others


def layer_widths(tensors, config, path):
    """(heads, neurons) of each layer by the shapes of `from_published`'s tensors; BadInput where the configuration has
    fewer."""
    layers = range(config.num_hidden_layers)
    heads = tuple(len(tensors[f"layers.{i}.query_key_value.bias"]) // (3 * config.head_size) for i in layers)
    neurons = tuple(len(tensors[f"layers.{i}.intermediate.bias"]) for i in layers)
    if max(heads) > config.num_attention_heads or max(neurons) > config.intermediate_size:
        raise BadInput(f"{path} has layers wider than its configuration: {max(heads)} heads, {max(neurons)} neurons")
    return heads, neurons


def missing_modules(tensors, expected, path):
    """The heads of which `from_published`'s tensors lack a part, given the shapes {name: shape} of the model.

    Raises BadInput that names a tensor of the encoder which is missing, or any that has another shape.
    """
    for name, shape in expected.items():
        if name not in tensors and not name.startswith(("mlm_head.", "classifier.", "pooler.")):
            raise BadInput(f"{path} has no tensor for {name}")
        if name in tensors and tensors[name].shape != shape:
            found = tuple(tensors[name].shape)
            raise BadInput(f"{path}: {name} has shape {found}, its configuration says {tuple(shape)}")
    return sorted({name.split(".")[0] for name in expected if name not in tensors})


def to_huggingface(state, model_type):
    """{bert.py's name: tensor} -> {published name: tensor}, as transformers' ...For... classes name them."""
    back = {ours: published for published, ours in (ENCODER | HEADS[model_type]).items()}
    tensors = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        number = re.search(r"\d+", stem)
        number = number and number[0]
        if stem.endswith("query_key_value"):
            for part, chunk in zip(PARTS, tensor.chunk(3)):
                tensors[f"{model_type}.encoder.layer.{number}.attention.self.{part}.{kind}"] = chunk
        else:
            published = back[re.sub(r"\d+", "{}", stem)].format(number)
            prefix = "" if published.startswith(("cls.", "lm_head", "classifier")) else f"{model_type}."
            tensors[f"{prefix}{published}.{kind}"] = tensor
    return tensors


def load_report(model):
    """What was missing and what was left out when the Bert was loaded, a line each; not the MLM head, which search.py
    fits and speaks of."""
    initialized = ", ".join(name for name in model.initialized if name != "mlm_head")
    unused = sorted({name.rpartition(".")[0] or name for name in model.unused})
    more = f" and {len(unused) - 6} more" if len(unused) > 6 else ""
    lines = {"newly initialized": initialized, "left out": ", ".join(unused[:6]) + more}
    return [f"{what}: {names}" for what, names in lines.items() if names]
