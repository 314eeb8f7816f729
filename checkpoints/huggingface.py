"""Published models: config.json, the files of the weights, PyTorch's .bin, and the names of the tensors in `bert.py`.

Not supported: HDF5 (tf_model.h5), Flax, ONNX.
"""

import functools
import hashlib
import os
import pickle
import re
import reprlib
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path, PureWindowsPath

import torch

from checkpoints import cache
from checkpoints.families import FAMILIES
from checkpoints.safetensors import MappedTensors, read_safetensors
from checkpoints.tensorflow1 import read_tensorflow
from runtime.cli import BadInput, first_few, one_line
from runtime.files import atomic_write, read_json, sha256, write_json

SUPPORTED = {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",), "is_decoder": (False, None)}
LIMITS = {"num_hidden_layers": 2**10, "num_attention_heads": 2**10, "hidden_size": 2**16, "intermediate_size": 2**18}
print_once = functools.cache(print)  # prints each line only once


def read_config(path, sizes):
    """{name: value} of the configuration of the model at `path`: its model_type, and those of `sizes` that it has.

    path: a model folder, or a file of its weights. sizes: {name: type}. Raises BadInput if bert.py cannot run it.
    """
    path, config = config_json(path)
    architecture = reprlib.repr(config.get("architectures"))  # old configurations have no model_type
    named = [of for of, family in FAMILIES.items() if re.search(f"'{family.name}(For|Model)", architecture)]
    model_type = config.setdefault("model_type", (named or ["bert"])[0])
    family = FAMILIES.get(str(model_type), FAMILIES["bert"])
    names = {published: ours for ours, published in family.config.items()}
    config = family.defaults | {names.get(name, name): value for name, value in config.items()}
    for name, supported in {"model_type": tuple(FAMILIES), **SUPPORTED}.items():
        if config.get(name, supported[0]) not in supported:
            value = reprlib.repr(config[name])
            raise BadInput(f"{path} has {name} {value}; bert.py runs {' and '.join(map(repr, supported))}")
    dropout = config.get("classifier_dropout")
    if dropout not in (None, config.get("hidden_dropout_prob", 0.1)):
        used = "bert.py uses hidden_dropout_prob before the classifier, too"
        print_once(f"{path} has classifier_dropout {reprlib.repr(dropout)}; {used}")
    found = {name: config[name] for name in ("model_type", *sizes) if name in config}
    for name, kind in sizes.items():
        least = 1 if kind is int and name not in ("pad_token_id", *family.defaults) else 0
        most = 1 if name.endswith("dropout_prob") else LIMITS.get(name, 2**24)
        if name in found and (type(found[name]) not in (int, kind) or not least <= found[name] < most):
            raise BadInput(f"{path}: {name} {reprlib.repr(found[name])} is not a valid value")
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
    """Write the config.json of a classifier, or of a masked language model if there are no labels, with transformers'
    names. config: a Config as a dictionary."""
    family = FAMILIES[config["model_type"]]
    config = {name: value for name, value in config.items() if name not in ("num_labels", "heads", "neurons")}
    kind = "ForSequenceClassification" if labels else "ForMaskedLM"
    config |= {"architectures": [f"{family.name}{kind}"], "hidden_act": "gelu"}
    if labels:
        config |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        config["label2id"] = {name: i for i, name in enumerate(labels)}
    config = {family.config.get(name, name): value for name, value in config.items()}
    write_json(os.path.join(folder, "config.json"), config)


# names of weights on the hub, in order of preference; an index lists several files (shards)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# the same in a model folder; TensorFlow's are bert_model.ckpt.index, model.ckpt-1000000.index, ...
PATTERNS = (*WEIGHTS, "*.index", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # transformers writes these, too
# first bytes -> what such a file is
OTHER_FORMATS = {
    b"\x89HDF": "an HDF5 file of Keras",
    b"version https://git-lfs": "a Git LFS pointer: `git lfs pull` fetches the file",
    b"<": "a web page",
}


def weight_files(path):
    """The files with the weights of a model; an index of several files comes first.

    path: a model folder, or a weights file; for TensorFlow also bert_model.ckpt, the common stem of the file names.
    """
    path = Path(path)
    if path.is_dir():
        matches = (sorted(path.glob(pattern)) for pattern in PATTERNS)
        weights = ([file for file in files if not file.name.startswith(NOT_WEIGHTS)] for files in matches)
        found = next(filter(None, weights), [])
        latest = path / "checkpoint"  # TensorFlow writes the name of the last checkpoint there
        if len(found) > 1 and latest.is_file():
            named = re.search(r'^model_checkpoint_path: "(.+)"', latest.read_text("utf8", errors="replace"))
            found = [file for file in found if named and file.name == f"{Path(named[1]).name}.index"] or found
    else:
        if stem := re.fullmatch(r"(.+)\.(data-\d+-of-\d+|meta)", path.name):
            raise BadInput(f"{path} is one of several files of a TensorFlow checkpoint: give {stem[1]}.index beside it")
        found = [file for file in (path, Path(f"{path}.index")) if file.is_file()]
    if not found:
        inner = ", ".join(sorted(config.parent.name for config in path.glob("checkpoint-*/config.json")))
        remedy = "add model.safetensors, pytorch_model.bin or bert_model.ckpt.index"
        raise BadInput(f"{path} has no weights: {f'give one of its folders {inner}' if inner else remedy}")
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
    """The names of the files in an index of shards, {"weight_map": {tensor name: file name}}."""
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise BadInput(f"{index} has no weight_map, so it does not say where the tensors are")
    for name in entries.values():
        if relative_path(name, f"{index}: file name").name != name:
            raise BadInput(f"{index} names a file {name!r}, which is not a file beside it")
    return sorted(set(entries.values()))


def read_weights(path):
    """Mapped {published name: tensor} of the model at `path`, in any of the formats."""
    first, *parts = weight_files(path)
    if first.suffix == ".index":
        return read_tensorflow(first)
    tensors = MappedTensors()
    for shard in map(read_file, parts or [first]):
        tensors |= shard
        tensors.files += shard.files
    return tensors


def read_file(path):
    """Mapped {published name: tensor} of a safetensors or PyTorch file, recognized by its first bytes."""
    with open(path, "rb") as file:
        first = file.read(40)
    for start, what in OTHER_FORMATS.items():
        if first.startswith(start):
            raise BadInput(f"{path} is {what}: give model.safetensors, pytorch_model.bin or bert_model.ckpt.index")
    if path.suffix == ".safetensors" or first[8:9] == b"{":  # its header
        return read_safetensors(path)[0]
    if first.startswith((b"PK\3\4", b"\x80")):  # zip, pickle
        return read_bin(path, is_zip=first.startswith(b"PK"))
    raise BadInput(f"{path} is neither a safetensors file nor a PyTorch checkpoint")


def weights_sha256(path):
    """The sha256 of a model's weights; of several files, that of their concatenated sha256."""
    digests = [sha256(file) for file in weight_files(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def relative_path(name, what):
    """`name` as a path. Raises BadInput if it could lead out of a folder on any system. what: kind of name."""
    path = PureWindowsPath(name if isinstance(name, str) else "")  # splits at / and \
    if path.anchor or ".." in path.parts or not path.parts or re.search("[\0\ud800-\udfff]", name):
        raise BadInput(f"{what} {reprlib.repr(name)} is not a path inside its folder")
    return path


def unpack(archive):
    """The folder of a zip archive like Google's uncased_L-12_H-768_A-12.zip, unpacked once into the cache."""

    def extract(folder):
        shutil.rmtree(folder, ignore_errors=True)  # if it is damaged
        try:
            with zipfile.ZipFile(archive) as archived, atomic_write(folder) as tmp_path:
                for name in archived.namelist():
                    relative_path(name, f"{archive}: file name")
                archived.extractall(tmp_path)
        except BadInput:
            raise
        except Exception as error:  # zipfile raises many types of exception for a damaged archive
            raise BadInput(f"{archive} is not a valid zip archive: {one_line(error)}") from None

    def intact(folder):
        with zipfile.ZipFile(archive) as archived:
            for member in archived.infolist():
                path = folder / member.filename
                if not member.is_dir() and not (path.is_file() and zlib.crc32(path.read_bytes()) == member.CRC):
                    raise BadInput(f"{path} is damaged")
        return folder

    folder = cache.get(cache.folder() / "unpacked" / sha256(archive), intact, extract)
    configs = [path for path in folder.rglob("*") if path.name in ("config.json", "bert_config.json")]
    return min(configs, key=lambda path: (len(path.parts), path)).parent if configs else folder


def read_bin(path, is_zip):
    """Mapped {name: tensor} of a PyTorch .bin: a zip archive, which is memory-mapped, or the older format."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:  # none of its code has run
        raise BadInput(f"{path} does not only hold tensors: damaged, or a pickle that would run code") from None
    except Exception as error:  # the unpickler raises many types of exception for a damaged file
        raise BadInput(f"{path} is not a valid PyTorch checkpoint: {one_line(error)}") from None
    entries = tensors if isinstance(tensors, dict) else {}  # perhaps a training checkpoint
    states = [value for value in (entries, *entries.values()) if is_state(value)]
    if len(states) != 1:
        names = reprlib.repr(list(entries))
        raise BadInput(f"{path} has {len(states)} sets of named tensors, not one, among its entries {names}")
    for name, tensor in states[0].items():
        is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_dense or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise BadInput(f"{path}: {name} is not a valid tensor")
    return MappedTensors(states[0])


def is_state(value):
    """Whether a value is a dictionary of named tensors."""
    is_named = isinstance(value, dict) and value and all(isinstance(name, str) for name in value)
    return is_named and all(isinstance(tensor, torch.Tensor) for tensor in value.values())


PARTS = ("query", "key", "value")  # three published tensors, one in bert.py
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # old versions of transformers saved these


def from_huggingface(tensors, model_type, layers, path):
    """Published tensors -> ({bert.py's name: float32 tensor}, [names of tensors that bert.py does not use]).

    Query, key and value are concatenated. path: for the messages.
    """
    family, found, unused = FAMILIES[model_type], {}, []
    names = family.encoder | {name.removeprefix(f"{model_type}."): ours for name, ours in family.heads.items()}
    names = {published.format(i): ours.format(i) for published, ours in names.items() for i in range(layers)}
    of_encoder = tuple({f"{name.split('.')[0]}." for name in family.encoder})
    for name, tensor in without_wrapper(tensors, model_type, path).items():
        stem, _, kind = name.rpartition(".")
        if name in BUFFERS:
            continue
        if name.startswith(of_encoder) and not tensor.is_floating_point():
            raise BadInput(f"{path}: {name} has dtype {tensor.dtype}, which is not floating-point")
        if stem in names:
            kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)  # LayerNorm in TensorFlow
            found[f"{names[stem]}.{kind}"] = finite = tensor.float()
            if not finite.sum().isfinite() and not finite.isfinite().all():  # the sum is faster, and may overflow
                raise BadInput(f"{path}: {name} has NaN or infinity: the file is damaged, or its training diverged")
            if isinstance(tensors, MappedTensors) and tensor.nbytes > 2**22:
                tensors.release()
        elif name.startswith(of_encoder):
            raise BadInput(f"{path} has a tensor {name}, which does not fit its configuration")
        else:
            unused.append(name)
    for name in (f"layers.{i}.query_key_value.{kind}" for i in range(layers) for kind in ("weight", "bias")):
        parts = [name.replace("query_key_value", part) for part in PARTS]
        try:
            found[name] = torch.stack([found.pop(part) for part in parts]).flatten(0, 1)
        except KeyError as missing:
            raise BadInput(f"{path} has no tensor for {missing.args[0]}") from None
        except (RuntimeError, IndexError):
            raise BadInput(f"{path}: the tensors for {', '.join(parts)} have shapes that fit no model") from None
    if "mlm_head.decoder.bias" in found:  # equal to mlm_head.bias; many files have both
        found.setdefault("mlm_head.bias", found.pop("mlm_head.decoder.bias"))
    return found, unused


def without_wrapper(tensors, model_type, path):
    """The tensors under their names without the family's prefix and without a wrapper's, such as `module.` or `model.`.
    The wrapper's prefix is found from the name of the token embeddings."""
    anchor = f"{next(iter(FAMILIES[model_type].encoder))}.weight"
    wrappers = [name.removesuffix(anchor) for name in tensors if f".{name}".endswith(f".{anchor}")]
    if len(wrappers) != 1:
        holds = " and ".join(map(repr, wrappers[:3])) or f"but {reprlib.repr(list(tensors))}"
        raise BadInput(f"{path} has {len(wrappers) or 'no'} tensors {anchor}, {holds}: give the weights of one model")
    family = wrappers[0].rstrip(".").rpartition(".")[2]
    if family in FAMILIES and family != model_type:
        raise BadInput(f'{path} has the tensors of a {family}: write "model_type": "{family}" into its config.json')
    wrapper = wrappers[0].removesuffix(f"{model_type}.")
    return {name.removeprefix(wrapper).removeprefix(f"{model_type}."): tensor for name, tensor in tensors.items()}


def layer_widths(tensors, config, path):
    """(heads, neurons) of each layer, from the shapes of the tensors of `from_huggingface`."""

    def widths(part, size):
        biases = (tensors.get(f"layers.{i}.{part}.bias", torch.empty(0)) for i in range(config.num_hidden_layers))
        return tuple(bias.numel() // size for bias in biases)

    heads, neurons = widths("query_key_value", 3 * config.head_size), widths("intermediate", 1)
    if max(heads) > config.num_attention_heads or max(neurons) > config.intermediate_size:
        raise BadInput(f"{path} has layers wider than its configuration: {max(heads)} heads, {max(neurons)} neurons")
    return heads, neurons


def missing_modules(tensors, expected, path):
    """Names of the heads (mlm_head, pooler, classifier) that are not complete in the tensors of `from_huggingface`.

    expected: {name: shape} of the model. Raises BadInput for any other tensor that is missing, or has another shape.
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
    family, tensors = FAMILIES[model_type], {}
    published = {ours: f"{model_type}.{name}" for name, ours in family.encoder.items()}
    published |= {ours: name for name, ours in family.heads.items()}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        number = re.search(r"\d+", stem)
        stem = re.sub(r"\d+", "{}", stem)
        parts = {stem: tensor}
        if stem.endswith("query_key_value"):
            parts = {stem.replace("query_key_value", part): chunk for part, chunk in zip(PARTS, tensor.chunk(3))}
        for stem, tensor in parts.items():
            public = published.get(stem) or published[f"{stem}.decoder"]  # DistilBERT's bias is beside its matrix
            tensors[f"{public.format(number and number[0])}.{kind}"] = tensor
    return tensors


def load_report(model):
    """Lines for the user: modules of a loaded Bert that are new or unused, and a classifier, perhaps of another task.

    Leaves out the MLM head, which search.py fits and reports.
    """
    initialized = [name for name in model.initialized if name != "mlm_head"]
    unused = sorted({name.rpartition(".")[0] or name for name in model.unused})
    kept = ["classifier"] if model.classifier is not None and "classifier" not in initialized else []
    lines = {"newly initialized": initialized, "not used": unused, "kept as published": kept}
    return [f"{what}: {first_few(names, 6)}" for what, names in lines.items() if names]
