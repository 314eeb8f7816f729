"""inputs/hub.py against a small hub on this machine: faults, the cache, offline mode, the token, models by name."""

import email.utils
import os
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch

import data
from bert import Bert
from inputs import hub
from inputs.tokenizer import Tokenizer
from runtime import files
from runtime.cli import BadInput
from tests.conftest import COMMIT, LARGE, VOCABULARY, published_as, saved, spawn

FAULTS = ("truncate", "corrupt", "html", "503", "404", "stall")


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_retried(server, fault):
    server.files["large.bin"], server.faults = LARGE, [fault]
    assert hub.fetch("owner/name", "large.bin").read_bytes() == LARGE
    gets = [headers for command, path, headers in server.seen if command == "GET"]
    assert len(gets) == 2
    if fault in ("truncate", "stall"):
        resumed = int(gets[1]["Range"].removeprefix("bytes=").removesuffix("-"))
        assert len(LARGE) // 2 - hub.CHUNK < resumed <= len(LARGE) // 2
    assert server.waits == ([3] if fault == "503" else [0.5])


def test_invalid_retry_after_is_ignored(server):
    server.files["large.bin"], server.faults, server.retry_after = LARGE, ["503"] * 2, "soon"
    assert hub.fetch("owner/name", "large.bin").read_bytes() == LARGE
    assert server.waits == [1]  # urllib3 waits before the second retry, but not before the first


@pytest.mark.parametrize("fault", FAULTS)
def test_permanent_fault_is_an_error_in_one_line_and_leaves_no_file(server, fault, tmp_path):
    server.files["large.bin"], server.faults = LARGE, [fault] * 99
    with pytest.raises(BadInput, match="cannot fetch large.bin of owner/name from 127.0.0.1.*, 5 attempts") as error:
        hub.fetch("owner/name", "large.bin")
    assert "\n" not in str(error.value)
    assert sum(command == "GET" for command, *_ in server.seen) == hub.ATTEMPTS
    assert [
        path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".incomplete" and path.stat().st_size
    ] == []
    waited = sum(server.waits) + hub.ATTEMPTS * 8 * (fault == "stall")  # 8 s: the timeout, which is shorter here
    assert waited < 60
    server.faults = []
    assert hub.fetch("owner/name", "large.bin").read_bytes() == LARGE


def test_cached_file_is_not_fetched_again(server, monkeypatch):
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
def test_cache_is_shared_with_huggingface_hub(server, monkeypatch, dataset):
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


def test_two_processes_fetch_a_file_once(server):
    server.files["large.bin"], server.faults = LARGE, ["stall"]
    script = (
        "from inputs import hub; hub.TIMEOUT = (1, 1); print(len(hub.fetch('owner/name', 'large.bin').read_bytes()))"
    )
    both = [spawn(["-c", script]) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == [f"{len(LARGE)}\n"] * 2
    gets = [path for command, path, _ in server.seen if command == "GET"]
    assert len(gets) == 2  # the first broke off, the second resumed it


def test_token_is_sent_to_the_hub_only(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files["large.bin"], server.cdn = LARGE, server.url.replace("127.0.0.1", "localhost")
    hub.fetch("owner/name", "large.bin")
    sent = {path[:5]: headers.get("Authorization") for _, path, headers in server.seen}
    assert sent == {"/owne": "Bearer hf_secret", "/cdn/": None}


def test_long_retry_after_is_an_error(server):
    server.files["large.bin"], server.faults = LARGE, ["503"] * 2
    server.retry_after = email.utils.formatdate(time.time() + 600, usegmt=True)
    with pytest.raises(BadInput, match="is busy: try again in (599|600) seconds"):
        hub.fetch("owner/name", "large.bin")


def test_renamed_repository_is_followed_and_missing_file_is_named(server):
    server.files["large.bin"] = LARGE
    assert hub.fetch("renamed/name", "large.bin").read_bytes() == LARGE
    with pytest.raises(hub.NotOnHub, match="the hub has no gone.bin of owner/name"):
        hub.fetch("owner/name", "gone.bin")
    assert server.waits == []


def test_redirect_without_a_scheme_gets_no_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files["large.bin"] = LARGE
    server.cdn = server.url.replace("http://127.0.0.1", "//localhost")
    hub.fetch("owner/name", "large.bin")
    sent = {(path[:5], headers.get("Authorization")) for _, path, headers in server.seen}
    assert sent == {("/owne", "Bearer hf_secret"), ("/cdn/", None)}


def test_files_of_a_model_are_of_one_commit(server, tmp_path):
    """If config.json is cached from an older commit, the other files are fetched from that commit."""
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


def test_unreachable_hub_is_an_error_in_one_line(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="from 127.0.0.1:9: ConnectionError, 5 attempts"):
        hub.fetch("owner/name", "large.bin")


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin"])
def test_model_on_the_hub_is_found_by_name_and_then_offline(server, tmp_path, monkeypatch, kind):
    published_as(kind, saved(tmp_path / "original"), tmp_path / "model")
    server.files |= {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    path, sha256 = data.find_model("owner/name")
    expected = Bert.load(tmp_path / "model", mlm=True).state_dict()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert data.find_model("owner/name") == (path, sha256) and Tokenizer(path).size == len(VOCABULARY)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in Bert.load(path, mlm=True).state_dict().items())
    assert files.model_folder("runs", "owner/name") == Path("runs/name")


def test_cached_bert_base_is_found_by_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    repository, commit = data.ON_HUB["bert-base-uncased"]
    for name in (repository, "bert-base-uncased"):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        saved(folder / "snapshots" / commit)
        assert data.find_model("bert-base-uncased")[0] == folder / "snapshots" / commit
        shutil.rmtree(folder)


def test_folder_of_results_is_not_mistaken_for_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert-base-uncased").mkdir()  # as made by search.py --output .
    with pytest.raises(BadInput, match="model 'bert-base-uncased': config.json of .* is not in the cache"):
        data.find_model("bert-base-uncased")
    saved(tmp_path / "bert-base-uncased")
    assert data.find_model("bert-base-uncased")[0] == Path("bert-base-uncased")


def test_error_for_an_unknown_model_names_the_bundled_one(server):
    with pytest.raises(BadInput, match="model 'bert-nowhere': the hub has no config.json .*; minilm needs no network"):
        data.find_model("bert-nowhere")
