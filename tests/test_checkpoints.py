"""checkpoints/: safetensors, published models in every format, their tensors' names, and damaged files.

The oracles are the safetensors library and transformers.
"""

import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
import time
import unittest.mock
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import data
import search
from bert import Bert
from checkpoints import huggingface, tensorflow1
from checkpoints import safetensors as our_safetensors
from inputs.tokenizer import Tokenizer
from runtime import files
from runtime.cli import BadInput
from tests.conftest import FAMILIES, HERE, call, change, published_as, quick_search, saved
from tests.tensorflow1_writer import write_tensorflow


def test_safetensors_are_read_as_by_the_safetensors_library(tmp_path):
    path = tmp_path / "odd.safetensors"
    tensors = {"half": torch.randn(3, 5).half(), "b": torch.randn(7).bfloat16(), "f": torch.randn(2, 1, 4)}
    tensors |= {
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(3.5),
        "ids": torch.arange(6),
        "yes": torch.ones(3) > 0,
    }
    safetensors.torch.save_file(tensors, path, {"key": "value"})
    found, metadata = our_safetensors.read_safetensors(path)
    assert metadata == {"key": "value"} and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_written_safetensors_are_read_by_the_safetensors_library(tmp_path):
    path = tmp_path / "ours.safetensors"
    tensors = {"a": torch.randn(4, 3).t(), "mask": torch.tensor([True, False]), "none": torch.zeros(0, 2)}
    our_safetensors.write_safetensors(path, tensors, {"seed": 3, "ratios": [0.1, None]})
    found = safetensors.torch.load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["ratios"]) == [0.1, None]
    assert our_safetensors.read_with_metadata(path)[1] == {"seed": 3, "ratios": [0.1, None]}


def test_writing_to_a_mapped_tensor_does_not_change_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(5)}, path)
    before = path.read_bytes()
    our_safetensors.read_safetensors(path)[0]["a"].zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("writer", ["the safetensors library", "this project, with a checksum"])
def test_loading_maps_the_file_without_copying_it(tmp_path, writer):
    path = tmp_path / "large.safetensors"
    if writer == "the safetensors library":
        safetensors.torch.save_file({"a": torch.ones(2**26)}, path)
    else:
        our_safetensors.write_safetensors(path, {"a": torch.ones(2**26)}, {})
    script = f"""
from checkpoints.safetensors import read_safetensors
def resident_pages():
    return int(open('/proc/self/statm').read().split()[1])
before = resident_pages()
tensors, _ = read_safetensors({str(path)!r})
print((resident_pages() - before) * 4096, tensors['a'][5].item())
"""
    grown, value = subprocess.run(
        [sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True, check=True
    ).stdout.split()
    assert value == "1.0" and int(grown) < 2**26  # the tensor itself has 2^28 bytes


def test_the_checksum_is_that_of_the_file_with_zeros_in_its_place(tmp_path):
    path = tmp_path / "ours.safetensors"
    our_safetensors.write_safetensors(path, {"a": torch.randn(4, 3), "none": torch.zeros(0)}, {"seed": 3})
    with safetensors.safe_open(path, "pt") as file:
        found = file.metadata()["orticket_sha256"]
    assert hashlib.sha256(path.read_bytes().replace(found.encode(), b"0" * 64)).hexdigest() == found


def test_a_flipped_bit_anywhere_in_a_file_is_noticed(tmp_path):
    path = tmp_path / "ours.safetensors"
    our_safetensors.write_safetensors(path, {"a": torch.randn(3), "b": torch.tensor([True])}, {"seed": 3})
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(BadInput):
            our_safetensors.read_with_metadata(path)


def malformed():
    """{what is wrong: bytes of an invalid safetensors file}."""

    def file(header, body=b"\0" * 8):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + body

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {
        "empty": b"",
        "short": b"\0\0\0",
        "header beyond the end": (2**40).to_bytes(8, "little") + b"{}",
        "gigantic header": (2**64 - 1).to_bytes(8, "little") + b"{}",
        "not JSON": file(b"PK\3\4 this is a zip"),
        "not UTF-8": file(b'{"\xff\xfe": 1}'),
        "a list": file([1, 2]),
        "deep": file(b"[" * 100_000),
        "no shape": file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
        "truncated": file({"a": entry})[:-1],
        "too long": file({"a": entry}) + b"\0",
        "unknown dtype": file({"a": entry | {"dtype": "F7"}}),
        "dtype a list": file({"a": entry | {"dtype": ["F32"]}}),
        "negative shape": file({"a": entry | {"shape": [-2]}}),
        "boolean shape": file({"a": entry | {"shape": [True]}}),
        "gigantic shape": file({"a": entry | {"shape": [2**62, 2**62]}}),
        "overflowing shape": file({"a": entry | {"shape": [0, 2**70], "data_offsets": [0, 0]}}, b""),
        "negative offsets": file({"a": entry | {"data_offsets": [-8, 0]}}),
        "offsets not a pair": file({"a": entry | {"data_offsets": 8}}),
        "overlap": file({"a": entry, "b": entry}),
        "hole": file({"a": entry | {"data_offsets": [4, 12]}}, b"\0" * 12),
        "sizes exchanged": file(
            {"a": entry | {"shape": [1]}, "b": entry | {"data_offsets": [8, 12]}},
            b"\0" * 12,
        ),
        "bad metadata": file({"a": entry, "__metadata__": [1]}),
        "a pickle": b"\x80\x02c__builtin__\nprint\n(S'run'\ntR.",
    }


@pytest.mark.parametrize("kind", malformed())
def test_malformed_safetensors_file_is_an_error_in_one_line(tmp_path, kind):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(malformed()[kind])
    with pytest.raises(BadInput, match="is not a valid safetensors file") as refused:
        our_safetensors.read_safetensors(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


FIXTURE = HERE / "tests" / "fixture"


FORMATS = ("safetensors", "shards", "bin", "legacy bin", "bin shards")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_loads_as_identical_tensors(tmp_path, kind):
    model = saved(tmp_path / "model")
    published_as(kind, model, tmp_path / "other")
    expected, found = (Bert.load(tmp_path / name, mlm=True).state_dict() for name in ("model", "other"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_half_precision_weights_are_converted_to_float32(tmp_path, kind, dtype):
    model = saved(tmp_path / "model").to(dtype)
    published_as(kind, model, tmp_path / "half")
    found = Bert.load(tmp_path / "half", mlm=True).word_embeddings.weight
    assert found.dtype == torch.float32 and torch.equal(found, model.get_input_embeddings().weight.float())


def test_tensorflow_checkpoint_is_read_as_by_transformers():
    found = huggingface.read_weights(FIXTURE / "bert_model.ckpt")
    found = {re.sub("gamma$", "weight", re.sub("beta$", "bias", name)): tensor for name, tensor in found.items()}
    expected = safetensors.torch.load_file(FIXTURE / "expected.safetensors")
    assert expected.keys() == found.keys() and len(expected) == 46
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_optimizer_variables_of_a_tensorflow_checkpoint_are_left_out(tiny, tmp_path):
    tensors = huggingface.read_weights(tiny)
    name = "bert.encoder.layer.0.output.dense.kernel"
    optimizers = {f"{name}.{of}": torch.ones(40, 24) for of in ("adam_m", "Adam", "AdamWeightDecayOptimizer", "lamb_v")}
    write_tensorflow(tmp_path / "model.ckpt", tensors | optimizers | {"global_step": torch.ones(1)})
    shutil.copy(tiny / "config.json", tmp_path)
    expected, found = (Bert.load(path, mlm=True).state_dict() for path in (tiny, tmp_path))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_tensorflow_model_is_found_by_its_folder_archive_or_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = google_folder(tmp_path / "cased_L-2_H-4_A-2")
    archive = shutil.make_archive(folder, "zip", tmp_path, folder.name)
    expected = Bert.load(folder, mlm=True)
    assert expected.initialized == []
    assert sorted(expected.unused) == ["cls.seq_relationship.bias", "cls.seq_relationship.weight"]
    for name in (archive, archive, folder / "bert_model.ckpt", folder / "bert_model.ckpt.index"):
        path, sha256 = data.find_model(str(name))
        assert sha256 == data.find_model(str(folder))[1]
        assert files.model_folder("runs", str(name)) == Path("runs/cased_L-2_H-4_A-2")
        found = Bert.load(path, mlm=True).state_dict()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.state_dict().items())
        cased = Tokenizer(path)  # only the capital letter in its vocabulary says so
        assert cased.library.encode("T a t").tokens == ["[CLS]", "T", "a", "[UNK]", "[SEP]"]


def test_outermost_configuration_of_an_archive_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = google_folder(tmp_path / "model" / "uncased")
    for inner, name in (("__MACOSX/uncased", "._bert_config.json"), ("uncased/1_Pooling", "config.json")):
        (tmp_path / "model" / inner).mkdir(parents=True)
        (tmp_path / "model" / inner / name).write_text("{}")
    archive = shutil.make_archive(tmp_path / "model", "zip", tmp_path / "model")
    path, sha256 = data.find_model(archive)
    assert path.name == "uncased" and sha256 == data.find_model(str(folder))[1]


def google_folder(folder):
    """The TensorFlow fixture as Google publishes a model."""
    folder.mkdir(parents=True)
    for path in FIXTURE.iterdir():
        if path.name.startswith(("bert_", "vocab")):
            shutil.copy(path, folder)
    return folder


def test_of_several_tensorflow_checkpoints_the_latest_is_used(tmp_path):
    folder = google_folder(tmp_path / "model")
    for path in list(folder.glob("bert_model.ckpt*")):
        shutil.copy(path, folder / path.name.replace("bert_model.ckpt", "model.ckpt-100"))
    with pytest.raises(BadInput, match="has several weights, bert_model.ckpt.index, model.ckpt-100.index"):
        huggingface.weight_files(folder)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-100"\n')
    names = [path.name for path in huggingface.weight_files(folder)]
    assert names == ["model.ckpt-100.index", *(f"model.ckpt-100.data-0000{i}-of-00002" for i in range(2))]


def renamed(tensors, change):
    return {change(name): tensor for name, tensor in tensors.items()}


def old_names(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(
    "change",
    [old_names, lambda name: name.removeprefix("roberta.").removeprefix("bert.")],
    ids=["gamma and beta", "no prefix"],
)
def test_variants_of_tensor_names_load_as_the_same_model(tmp_path, family, change):
    model = saved(tmp_path / "model", FAMILIES[family]["mlm"], family=family)
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    tensors = renamed(model.state_dict(), change) | {
        "cls.seq_relationship.weight": torch.ones(2, 24),
        f"{family}.embeddings.position_ids": torch.arange(64)[None],
    }
    assert tensors.keys() != model.state_dict().keys()
    torch.save(tensors, tmp_path / "other" / "pytorch_model.bin")
    (tmp_path / "other" / "model.safetensors").unlink()
    expected, found = (Bert.load(tmp_path / name, mlm=True) for name in ("model", "other"))
    assert found.initialized == [] and found.unused == ["cls.seq_relationship.weight"]
    assert huggingface.load_report(found) == ["not used: cls.seq_relationship"]
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[key])


def test_missing_heads_are_initialized_only_if_requested(tmp_path):
    saved(tmp_path, transformers.BertModel)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler")}
    safetensors.torch.save_file(headless, tmp_path / "model.safetensors")
    assert Bert.load(tmp_path).initialized == [] and huggingface.load_report(Bert.load(tmp_path)) == []
    assert Bert.load(tmp_path, mlm=True).initialized == ["mlm_head"]
    model = Bert.load(tmp_path, num_labels=3)
    assert huggingface.load_report(model) == ["newly initialized: classifier, pooler"]
    assert model.pooler.weight.std().item() == pytest.approx(0.3, rel=0.1)  # the configuration's initializer_range
    assert not model.pooler.bias.any() and model.classifier.weight.shape == (3, 24)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("bert.encoder.layer.0.attention.self.distance_embedding.weight", (9, 8), "does not fit"),
        ("bert.encoder.layer.2.output.dense.weight", (24, 40), "does not fit"),
        ("bert.embeddings.projection.weight", (24, 24), "does not fit"),
        ("bert.encoder.layer.1.output.dense.bias", None, "no tensor for layers.1.output.bias"),
        (
            "bert.encoder.layer.1.attention.self.key.bias",
            None,
            "no tensor for layers.1.key.bias",
        ),
        ("bert.embeddings.LayerNorm.weight", None, "no tensor for embedding_norm.weight"),
        ("cls.predictions.transform.dense.weight", (24, 25), "shape (24, 25), its configuration says (24, 24)"),
    ],
)
def test_missing_or_unexpected_tensor_is_named(tmp_path, name, shape, message):
    model = saved(tmp_path)
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items() if key != name}
    safetensors.torch.save_file(tensors | ({name: torch.zeros(shape)} if shape else {}), tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=re.escape(message)):
        Bert.load(tmp_path, mlm=True)


def test_integer_weights_are_an_error(tmp_path):
    tensors = saved(tmp_path).state_dict()
    name = "bert.embeddings.LayerNorm.weight"
    safetensors.torch.save_file(
        {k: t.clone() for k, t in tensors.items()} | {name: torch.ones(24).long()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(BadInput, match="embeddings.LayerNorm.weight has dtype torch.int64"):
        Bert.load(tmp_path)


def test_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    witness = tmp_path / "it ran"

    class Malicious:
        def __reduce__(self):
            return Path.touch, (witness,)

    for modern in (True, False):
        torch.save({"a": Malicious()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=modern)
        with pytest.raises(BadInput, match="damaged, or a pickle that would run code"):
            Bert.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(BadInput):
        Bert.load(tmp_path)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..\\evil", "C:\\evil"])
def test_archive_with_path_traversal_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "evil")
    with pytest.raises(BadInput, match="not a path inside its folder"):
        data.find_model(str(path))
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix not in (".zip", ".lock")]


INVALID_SHARDS = {
    "no map": ({"metadata": {}}, "no weight_map"),
    "a list": ([1], "is not a JSON object"),
    "a path out of the folder": ({"weight_map": {"a": "../model.safetensors"}}, "is not a path inside its folder"),
    "a number": ({"weight_map": {"a": 1}}, "is not a path inside its folder"),
    "a missing file": ({"weight_map": {"a": "gone.safetensors"}}, "which is not a file beside it"),
}


@pytest.mark.parametrize("case", INVALID_SHARDS)
def test_invalid_index_of_shards_is_an_error(tmp_path, case):
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    index, message = INVALID_SHARDS[case]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=message):
        Bert.load(tmp_path)


def mutants(original, generator, count):
    """Yield files with up to five changes: bytes overwritten, inserted or removed, or the end cut off."""
    for _ in range(count):
        mutant = bytearray(original)
        for _ in range(generator.integers(1, 6)):
            reach = (
                len(mutant) if generator.random() < 0.3 else min(len(mutant), 3000)
            )  # headers are at the beginning or the end
            start = int(generator.integers(0, reach))
            start = start if generator.random() < 0.5 else len(mutant) - 1 - start
            new = generator.bytes(int(generator.integers(0, 4)))
            mutant[start : start + (len(new) if generator.random() < 0.7 else 1)] = new
        yield bytes(mutant[: int(generator.integers(1, len(mutant)))] if generator.random() < 0.1 else mutant)


@pytest.mark.parametrize("kind", [*FORMATS, "tensorflow", "tensorflow, checksums put right", "archive"])
def test_mutated_files_give_models_or_errors_in_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    if kind in FORMATS:
        path = published_as(kind, saved(tmp_path / "original"), folder)
    else:
        path = google_folder(folder) / "bert_model.ckpt.index"
    if kind == "archive":
        path = Path(shutil.make_archive(folder, "zip", tmp_path, folder.name))
    if "checksums" in kind:
        monkeypatch.setattr(tensorflow1, "crc32c", lambda data: unittest.mock.ANY)  # equal to every checksum
    original, refused = path.read_bytes(), 0
    for mutant in mutants(original, np.random.Generator(np.random.PCG64(0)), 500):
        path.unlink()  # mapped files must not change
        path.write_bytes(mutant)
        try:
            Bert.load(huggingface.unpack(path) if kind == "archive" else folder, mlm=True)
        except BadInput as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
            refused += 1
    assert 100 < refused


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b""),
            "not a valid safetensors file: ValueError cannot mmap an empty file",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: change(folder, hidden_act="relu"), "hidden_act 'relu'; bert.py runs 'gelu'"),
        (lambda folder: change(folder, hidden_size=0), "hidden_size 0 is not a valid value"),
        (lambda folder: change(folder, vocab_size=10**25), "000 is not a valid value"),
        (lambda folder: change(folder, is_decoder=True), "is_decoder True; bert.py runs False"),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}'),
            "is for a BertJapaneseTokenizer, which needs its tokenizer.json",
        ),
        (lambda folder: change(folder, tokenizer_class="BertweetTokenizer"), "is for a BertweetTokenizer"),
        (lambda folder: change(folder, hidden_size=48), "has shape"),
        (lambda folder: change(folder, hidden_size=25), "hidden_size 25 is not a multiple of num_attention_heads"),
        (
            lambda folder: change(folder, model_type="roberta", pad_token_id=1, max_position_embeddings=2),
            "max_position_embeddings 2 leaves no position",
        ),
        (
            lambda folder: change(folder, num_hidden_layers=3),
            "has no tensor for layers.2.query.weight",
        ),
        (lambda folder: change(folder, num_hidden_layers=1), "which does not fit its configuration"),
        (lambda folder: change(folder, hidden_dropout_prob=1.0), "hidden_dropout_prob 1.0 is not a valid value"),
        (lambda folder: change(folder, intermediate_size=39), "layers wider than its configuration"),
        (lambda folder: change(folder, intermediate_size=41), "is pruned: search the full model"),
        (lambda folder: change(folder, vocab_size=56), "has 57 tokens, the model 56"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
        (lambda folder: (folder / "vocab.txt").unlink(), "has no tokenizer.json, vocab.txt or vocab.json"),
        (lambda folder: (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na"), "has no [MASK]"),
    ],
)
def test_damaged_model_folder_is_an_error_in_one_line(tmp_path, corpus, capsys, damage, message):
    saved(tmp_path / "model")
    damage(tmp_path / "model")
    assert call(search, *quick_search(tmp_path / "model", corpus, tmp_path)[1:]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


OTHER_NAMES = {"weights.pt": "bin", "epoch-3.ckpt": "bin", "model.pth": "legacy bin", "weights": "safetensors"}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_format_of_a_file_of_any_name_is_told_by_its_content(tmp_path, name):
    model = saved(tmp_path / "model")
    path = published_as(OTHER_NAMES[name], model, tmp_path / "other")
    path = path.rename(path.with_name(name))
    expected = Bert.load(tmp_path / "model", mlm=True).state_dict()
    for place in (path, path.parent) if path.suffix else (path,):
        found = Bert.load(place, mlm=True).state_dict()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("weights.pt", b"\x89HDF\r\n\x1a\n", "is an HDF5 file of Keras: give model.safetensors, pytorch_model.bin"),
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1",
            "is a Git LFS pointer: `git lfs pull`",
        ),
        ("pytorch_model.bin", b"<!DOCTYPE html>", "is a web page"),
        ("weights.pt", b"\x00\x01\x02", "is neither a safetensors file nor a PyTorch checkpoint"),
        ("weights.pt", b"", "is neither a safetensors file nor a PyTorch checkpoint"),
        ("bert_model.ckpt.data-00000-of-00001", b"\0" * 99, "is one of several files .*give bert_model.ckpt.index"),
        ("bert_model.ckpt.meta", b"\0" * 99, "is one of several files .*give bert_model.ckpt.index"),
    ],
)
def test_file_that_is_no_model_is_named(tmp_path, name, content, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"{name} {message}"):
        Bert.load(tmp_path / name)


WRAPPERS = {
    "DataParallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "torch.compile in a class": lambda state: {f"_orig_mod.model.{name}": tensor for name, tensor in state.items()},
    "attribute instead of prefix": lambda state: {
        name.replace("bert.", "encoder_model."): tensor for name, tensor in state.items()
    },
    "training checkpoint": lambda state: {
        "epoch": 3,
        "model_state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
        "optimizer_state_dict": {"state": {0: {"step": 1, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    },
    "Lightning": lambda state: {
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "global_step": 5,
        "optimizer_states": [{"state": {}}],
    },
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapper_of_a_model_is_stripped(tmp_path, wrapper):
    model = saved(tmp_path / "model")
    expected = Bert.load(tmp_path / "model", mlm=True).state_dict()
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(WRAPPERS[wrapper](model.state_dict()), tmp_path / "model" / "pytorch_model.bin")
    found = Bert.load(tmp_path / "model", mlm=True)
    assert found.initialized == found.unused == []
    assert all(torch.equal(expected[key], tensor) for key, tensor in found.state_dict().items())


@pytest.mark.parametrize(
    "entries, message",
    [
        (lambda state: {"epoch": 3}, r"has 0 sets of named tensors, not one, among its entries \['epoch'\]"),
        (
            lambda state: {"model": state, "ema": state},
            r"has 2 sets of named tensors, not one, among its entries \['model', 'ema'\]",
        ),
        (lambda state: [1, 2], "has 0 sets of named tensors"),
        (lambda state: {"a": torch.ones(2)}, "has no tensors embeddings.word_embeddings.weight, but .'a'"),
        (
            lambda state: {f"{of}.{name}": tensor for of in ("query", "passage") for name, tensor in state.items()},
            "has 2 tensors .*'query.bert.' and 'passage.bert.': give the weights of one model",
        ),
        (
            lambda state: {name.replace("bert.", "roberta."): tensor for name, tensor in state.items()},
            'has the tensors of a roberta: write "model_type": "roberta"',
        ),
    ],
    ids=["no model", "two models", "a list", "other tensors", "two encoders", "another family"],
)
def test_what_is_missing_in_a_checkpoint_is_named(tmp_path, entries, message):
    state = saved(tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(entries(state), tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match=message):
        Bert.load(tmp_path)


def test_family_without_model_type_is_told_by_its_architecture(tmp_path):
    saved(tmp_path / "model", family="roberta")
    expected = Bert.load(tmp_path / "model", mlm=True)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["model_type"], config["pad_token_id"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    found = Bert.load(tmp_path / "model", mlm=True)
    assert found.config == expected.config and found.initialized == found.unused == []
    assert Tokenizer(tmp_path / "model").family == "roberta"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_tensor_with_nan_or_infinity_is_named(tmp_path, kind, value):
    model = saved(tmp_path / "model")
    published_as(kind, model, tmp_path / "good")
    model.bert.encoder.layer[1].output.dense.weight.data[3, 5] = value
    published_as(kind, model, tmp_path / "bad")
    with pytest.raises(BadInput, match="encoder.layer.1.output.dense.weight has NaN or infinity"):
        Bert.load(tmp_path / "bad")
    model.bert.encoder.layer[1].output.dense.weight.data[3, :2] = 3e38  # finite, though their sum is not
    model.bert.encoder.layer[1].output.dense.weight.data[3, 5] = 0
    published_as(kind, model, tmp_path / "large")
    Bert.load(tmp_path / "large")


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_size"])
def test_gigantic_model_is_refused_before_memory_is_allocated(tmp_path, corpus, capsys, name):
    saved(tmp_path / "model")
    change(tmp_path / "model", **{name: 2**23})
    started = time.monotonic()
    assert call(search, *quick_search(tmp_path / "model", corpus, tmp_path)[1:]) == 2
    assert f"{name} 8388608 is not a valid value" in capsys.readouterr().err and time.monotonic() - started < 2


@pytest.mark.parametrize("depth", [100, 400, 900, 100_000])
def test_deeply_nested_json_is_an_error_in_one_line(tmp_path, depth):
    nested = '{"a":' * depth + "1" + "}" * depth
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": {nested}}}}}')
    with pytest.raises(BadInput, match="is not a path inside its folder|is not JSON"):
        Bert.load(tmp_path)
    for name in ("model_type", "hidden_act", "hidden_size", "architectures"):
        (tmp_path / "config.json").write_text(f'{{"{name}": {nested}}}')
        with pytest.raises(BadInput) as error:
            Bert.load(tmp_path)
        assert len(str(error.value)) < 500


def test_classifier_that_is_kept_is_reported(tmp_path):
    """It may have learned another task (huggingface/transformers#14218)."""
    saved(tmp_path, transformers.BertForSequenceClassification, num_labels=3)
    assert huggingface.load_report(Bert.load(tmp_path, num_labels=3)) == ["kept as published: classifier"]
    assert huggingface.load_report(Bert.load(tmp_path, num_labels=2)) == ["newly initialized: classifier"]


def test_other_dropout_of_the_classifier_is_reported_once(tmp_path, capsys):
    """transformers has had it since huggingface/transformers#12781."""
    saved(tmp_path)
    for value in (None, 0.1):
        change(tmp_path, classifier_dropout=value)
        Bert.load(tmp_path)
    assert capsys.readouterr().out == ""
    change(tmp_path, classifier_dropout=0.5)
    Bert.load(tmp_path)
    Bert.load(tmp_path)
    assert capsys.readouterr().out.count("has classifier_dropout 0.5; bert.py uses hidden_dropout_prob") == 1


def test_other_files_of_a_training_are_not_taken_for_weights(tmp_path):
    """As in yuanzhoulvpi2017/zero_nlp#41: transformers writes them beside its checkpoints."""
    saved(tmp_path / "checkpoint-5")
    shutil.copy(tmp_path / "checkpoint-5" / "config.json", tmp_path)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"\x80")
    with pytest.raises(BadInput, match="has no weights: give one of its folders checkpoint-5"):
        Bert.load(tmp_path)


def test_file_that_is_replaced_while_it_is_read_is_no_damaged_file(tmp_path, monkeypatch):
    path, others = tmp_path / "a.safetensors", iter([torch.zeros(5)])
    our_safetensors.write_safetensors(path, {"x": torch.ones(3)}, {})
    checksum = our_safetensors.checksum

    def meanwhile(*arguments):
        our_safetensors.write_safetensors(path, {"x": next(others)}, {})
        return checksum(*arguments)

    monkeypatch.setattr(our_safetensors, "checksum", meanwhile)
    assert our_safetensors.read_safetensors(path)[0]["x"].tolist() == [1, 1, 1]
