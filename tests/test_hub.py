"""inputs/hub.py against a small hub on this machine: faults, the cache, offline mode, the token, models by name."""

import email.utils
import hashlib
import os
import shutil
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import requests
import torch

import data
from bert import Bert
from inputs import hub
from inputs.tokenizer import Tokenizer
from runtime import files
from runtime.cli import BadInput
from tests.conftest import COMMIT, HERE, LARGE, VOCABULARY, published_as, saved, spawn

FAULTS = ("truncate", "corrupt", "html", "503", "404", "stall")


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_retried(server, fault):
    server.files["large.bin"], server.faults = LARGE, [fault]
    assert hub.fetch("owner/name", "large.bin").read_bytes() == LARGE
    gets = [headers for _, path, headers in server.seen if path == "/cdn/large.bin"]
    assert len(gets) == 2
    if fault in ("truncate", "stall"):
        resumed = int(gets[1]["Range"].removeprefix("bytes=").removesuffix("-"))
        assert len(LARGE) // 2 - hub.CHUNK < resumed <= len(LARGE) // 2
    assert server.waits == ([3] if fault == "503" else [0.5])


@pytest.mark.parametrize("fault", FAULTS)
def test_permanent_fault_is_an_error_in_one_line_and_leaves_no_file(server, fault, tmp_path):
    server.files["large.bin"], server.faults = LARGE, [fault] * 99
    with pytest.raises(BadInput, match="cannot fetch large.bin of owner/name from 127.0.0.1.*, 5 attempts") as error:
        hub.fetch("owner/name", "large.bin")
    assert "\n" not in str(error.value)
    assert sum(path == "/cdn/large.bin" for _, path, _ in server.seen) == hub.ATTEMPTS
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
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    for revision in ("main", COMMIT):
        assert hub.fetch("owner/name", "large.bin", revision).read_bytes() == LARGE
    assert len(server.seen) == requests_so_far
    with pytest.raises(BadInput, match="other.bin of owner/name is not in the cache .* HF_HUB_OFFLINE forbids"):
        hub.fetch("owner/name", "other.bin")


@pytest.mark.parametrize("dataset", [False, True])
def test_cache_is_shared_with_huggingface_hub(server, monkeypatch, dataset):
    server.files |= {"large.bin": LARGE, "other.bin": LARGE[::-1]}
    cache, kind = hub.constants.HF_HUB_CACHE, "dataset" if dataset else "model"
    ours = hub.fetch("owner/name", "large.bin", dataset=dataset)
    found = huggingface_hub.hf_hub_download(
        "owner/name", "large.bin", repo_type=kind, cache_dir=cache, local_files_only=True
    )
    assert Path(found).samefile(ours) and Path(found).read_bytes() == LARGE
    monkeypatch.setattr(hub.constants, "ENDPOINT", hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{")[0])
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
    gets = [headers.get("Range") for _, path, headers in server.seen if path == "/cdn/large.bin"]
    assert len(gets) == 2 and gets[0] is None and gets[1]  # the first broke off, the second resumed it


def test_token_is_sent_to_the_hub_only(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files["large.bin"], server.cdn = LARGE, server.url.replace("127.0.0.1", "localhost")
    hub.fetch("owner/name", "large.bin")
    sent = {path[:5]: headers.get("Authorization") for _, path, headers in server.seen}
    assert sent == {"/owne": "Bearer hf_secret", "/cdn/": None}


@pytest.mark.parametrize("token, sent", [("hf_secret", "Bearer hf_secret"), ("", "Basic bWU6cGFzcw==")])
def test_hf_token_counts_before_netrc(server, monkeypatch, tmp_path, token, sent):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pass\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", token)
    server.files["small.txt"] = b"text"
    hub.fetch("owner/name", "small.txt")
    assert {headers.get("Authorization") for *_, headers in server.seen} == {sent}


def test_long_retry_after_is_not_waited_for(server):
    server.files["large.bin"], server.faults = LARGE, ["503"] * 99
    server.retry_after = email.utils.formatdate(time.time() + 600, usegmt=True)
    with pytest.raises(BadInput, match="status 503, 5 attempts; try again"):
        hub.fetch("owner/name", "large.bin")
    assert server.waits == [10] * 4


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


def test_another_commit_than_the_one_asked_for_is_named(server, capsys):
    server.files["large.bin"] = LARGE
    for revision in (COMMIT, "main"):
        hub.fetch("owner/name", "large.bin", revision)
    assert "sent commit" not in capsys.readouterr().out
    for _ in range(2):  # it is not remembered as the commit that was asked for
        hub.fetch("owner/name", "large.bin", "0" * 40)
        assert hub.in_cache(hub.cache_folder("owner/name", False), "large.bin", "0" * 40) is None
    host = hub.constants.ENDPOINT.removeprefix("http://")
    line = f"large.bin of owner/name: {host} sent commit {COMMIT}, not {'0' * 40} as asked\n"
    assert capsys.readouterr().out.endswith(line)


def test_unreachable_hub_is_an_error_in_one_line(server, monkeypatch):
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="from 127.0.0.1:9: ConnectionError, 5 attempts"):
        hub.fetch("owner/name", "large.bin")


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin"])
def test_model_on_the_hub_is_found_by_name_and_then_offline(server, tmp_path, monkeypatch, kind):
    published_as(kind, saved(tmp_path / "original"), tmp_path / "model")
    server.files |= {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    path, sha256 = data.find_model("owner/name")
    expected = Bert.load(tmp_path / "model", mlm=True).state_dict()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert data.find_model("owner/name") == (path, sha256) and Tokenizer(path).size == len(VOCABULARY)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in Bert.load(path, mlm=True).state_dict().items())
    assert files.model_folder("runs", "owner/name") == Path("runs/name")


def test_cached_bert_base_is_found_by_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
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


@pytest.fixture
def raw_server():
    """serve(function): the address of a server that gives every connection, and its request, to the function."""
    servers = []

    def serve(function, wrap=lambda connection: connection):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                try:
                    connection = wrap(self.request)
                    function(connection, connection.recv(10_000).decode())
                except OSError:  # the client has closed the connection
                    return

        servers.append(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler))
        servers[-1].daemon_threads, servers[-1].block_on_close = True, False
        threading.Thread(target=servers[-1].serve_forever, args=[0.05], daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_address[1]}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


HEADERS = f"HTTP/1.1 200 OK\r\nETag: {'0' * 40}\r\nX-Repo-Commit: {COMMIT}\r\n"
PIECES = {
    "headers": ["HTTP/1.1 200 OK\r\nX-Slow: ", *"a" * 400],
    "body": [f"{HEADERS}Content-Length: 5000\r\n\r\n", *"a" * 400],
    "size of a chunk": [f"{HEADERS}Transfer-Encoding: chunked\r\n\r\n", *"0" * 400],
}


@pytest.mark.parametrize("kind", PIECES)
def test_server_that_sends_a_byte_now_and_then_is_given_up(raw_server, server, monkeypatch, kind):
    def slowly(connection, request):
        for piece in PIECES[kind]:
            connection.sendall(piece.encode())
            threading.Event().wait(0.05)  # time.sleep is replaced

    monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://{raw_server(slowly)}")
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    monkeypatch.setattr(hub, "ATTEMPTS", 2)
    started = time.monotonic()
    expected = "less than 1,000 bytes a second for 0.2 seconds, 2 attempts"
    with pytest.raises(BadInput, match=f"cannot fetch a of owner/name from .*{expected}"):
        hub.fetch("owner/name", "a")
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("declared", ["X-Linked-Size: 5000\r\n", ""])
def test_server_that_sends_more_than_it_declared_is_cut_off(raw_server, server, monkeypatch, tmp_path, declared):
    def endless(connection, request):
        connection.sendall(f"{HEADERS}{declared}\r\n".encode())
        while True:
            connection.sendall(b"a" * 2**16)

    largest = []
    monkeypatch.setattr(hub, "LARGEST_UNDECLARED", 5000)
    monkeypatch.setattr(
        hub.Path, "unlink", lambda path, *_, **__: (largest.append(path.stat().st_size), os.remove(path))
    )
    monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://{raw_server(endless)}")
    with pytest.raises(BadInput, match="a wrong checksum, 5 attempts"):
        hub.fetch("owner/name", "a")
    assert len(largest) == hub.ATTEMPTS and max(largest) <= 5000 + hub.CHUNK


def test_checksum_is_the_hubs_and_not_that_of_its_storage(raw_server, server, monkeypatch):
    def answer(connection, request):
        body, status = (b"good", "302 Found\r\nLocation: /cdn") if "/resolve/" in request else (b"evil", "200 OK")
        headers = f"X-Linked-Etag: {hashlib.sha256(body).hexdigest()}\r\nX-Repo-Commit: {COMMIT}\r\nContent-Length: 4"
        connection.sendall(f"HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n\r\n".encode() + body)

    monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://{raw_server(answer)}")
    with pytest.raises(BadInput, match="a wrong checksum, 5 attempts"):
        hub.fetch("owner/name", "a")


PROXY_ANSWERS = {"https": "407 Proxy Authentication Required", "http": "407 Client Error"}


@pytest.mark.parametrize("scheme", PROXY_ANSWERS)
def test_error_of_a_proxy_names_its_variable(raw_server, server, monkeypatch, scheme):
    def refuse(connection, request):
        connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

    monkeypatch.setattr(hub.constants, "ENDPOINT", f"{scheme}://hub.example")
    for proxy, reason in ((raw_server(refuse), PROXY_ANSWERS[scheme]), ("127.0.0.1:9", "Connection refused")):
        monkeypatch.setenv(f"{scheme}_proxy", f"http://user:secret@{proxy}")
        with pytest.raises(BadInput, match=f"from hub.example: .*{reason}.*; check the proxy in HTTPS_PROXY") as error:
            hub.fetch("owner/name", "a")
        assert "secret" not in str(error.value)


def test_error_of_an_unknown_certificate_names_its_variable(raw_server, server, monkeypatch, tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    names = "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:TRUE"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem {names}"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    def missing(connection, request):
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    address = raw_server(missing, lambda connection: context.wrap_socket(connection, server_side=True))
    monkeypatch.setattr(hub.constants, "ENDPOINT", f"https://{address}")
    for bundle in (None, tmp_path / "gone.pem", tmp_path / "key.pem"):
        if bundle:
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
        with pytest.raises(BadInput, match="certificate.*; set REQUESTS_CA_BUNDLE"):
            hub.fetch("owner/name", "a")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
    with pytest.raises(hub.NotOnHub):
        hub.fetch("owner/name", "a")


def test_token_is_not_sent_on_a_redirect_without_tls():
    with requests.Session() as session:
        assert session.should_strip_auth("https://hub.example/a", "http://hub.example/a")
        assert not session.should_strip_auth("https://hub.example/a", "https://hub.example/b")


RETRY_AFTER = ["9" * 5000, "Fri, 31 Dec 99999 23:59:59 GMT", "Mon, 99 Foo 2026 99:99:99", "-1", "soon"]


@pytest.mark.parametrize("text", RETRY_AFTER)
def test_invalid_retry_after_is_an_error_in_one_line(server, text):
    server.files["large.bin"], server.faults, server.retry_after = LARGE, ["503"], text
    with pytest.raises(BadInput, match="cannot fetch large.bin of owner/name from 127.0.0.1") as error:
        hub.fetch("owner/name", "large.bin")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "header, reason",
    [
        ("Content-Length: " + "9" * 5000, "without checksum, size and commit"),
        ("X-Linked-Size: -1", "without checksum, size and commit"),
        ("X-Linked-Etag: ../../../a", "without checksum, size and commit"),
        ("Location: http://[", "Invalid IPv6 URL"),
        ("Location: file:///etc/passwd", "No connection adapters were found for 'file:///etc/passwd'"),
        ("Location: http://a.example:99999/", "Port out of range"),
    ],
    ids=["size", "negative size", "checksum", "Location", "scheme", "port"],
)
def test_odd_headers_are_an_error_in_one_line(raw_server, server, monkeypatch, header, reason):
    status = HEADERS.replace("200 OK", "302 Found") if header.startswith("Location") else HEADERS
    answer = f"{status}{header}\r\n\r\n".encode()
    monkeypatch.setattr(
        hub.constants, "ENDPOINT", f"http://{raw_server(lambda connection, _: connection.sendall(answer))}"
    )
    with pytest.raises(BadInput, match=f"cannot fetch a of owner/name from 127.0.0.1:.*{reason}"):
        hub.fetch("owner/name", "a")


@pytest.mark.parametrize("address", ["huggingface.co", "ftp://a.example", "http://[", "https://", "http://a:b", "\0"])
def test_endpoint_that_is_no_address_is_an_error_in_one_line(server, monkeypatch, address):
    monkeypatch.setattr(hub.constants, "ENDPOINT", address)
    with pytest.raises(BadInput, match="cannot fetch a of owner/name from .*(Invalid|No conn).*; check HF_ENDPOINT$"):
        hub.fetch("owner/name", "a")


@pytest.mark.parametrize("token", ["hf_a\nb", "hf_ä", "hf a"])
def test_token_that_no_header_can_carry_is_an_error_that_does_not_show_it(server, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(BadInput, match="HF_TOKEN has characters") as error:
        hub.fetch("owner/name", "a")
    assert token not in str(error.value)


PATHS = ["..", "../a", "a/../../b", "/a", "\\a", "..\\a", "C:\\a", "C:a", "", ".", "a\0b", "a\udcffb"]


@pytest.mark.parametrize("path", PATHS)
def test_name_that_leads_out_of_the_cache_is_refused(server, tmp_path, path):
    before = sorted(tmp_path.rglob("*"))
    for name, revision in ((path, "main"), ("a", path)):
        with pytest.raises(BadInput, match="(file name|revision) .* is not a path inside its folder"):
            hub.fetch("owner/name", name, revision)
    with pytest.raises(BadInput, match="revision .* is not a path inside its folder"):
        hub.fetch_model("owner/name", path)
    if path:
        with pytest.raises(BadInput, match="revision .* is not a path inside its folder"):
            data.find_task("sst2").load(path)
    assert sorted(tmp_path.rglob("*")) == before and server.seen == []


def test_local_folder_is_not_taken_for_a_revision(server, tmp_path):
    saved(tmp_path / "model")
    for revision in (str(tmp_path / "model"), "../../../model"):
        with pytest.raises(BadInput, match="is not a path inside its folder"):
            hub.fetch_model("owner/name", revision)


def test_damaged_blob_is_reported_and_fetched_again(server, monkeypatch, capsys):
    server.files |= {"large.bin": LARGE, "small.txt": b"few"}
    for name, content in server.files.items():
        blob = hub.fetch("owner/name", name).resolve()
        blob.write_bytes(content[::-1])
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(BadInput, match="is not in the cache"):
            hub.fetch("owner/name", name)
        assert f"{blob} is damaged" in capsys.readouterr().out
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        assert hub.fetch("owner/name", name).read_bytes() == content


def test_damaged_weights_of_a_cached_model_are_fetched_again(server, tmp_path, capsys):
    saved(tmp_path / "model")
    server.files |= {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    folder = hub.fetch_model("owner/name")
    seen = len(server.seen)
    assert hub.fetch_model("owner/name") == folder and len(server.seen) == seen
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-4] + b"1234")
    assert hub.fetch_model("owner/name") == folder
    assert blob.read_bytes() == server.files["model.safetensors"]
    assert capsys.readouterr().out.count("is damaged") == 1


def test_damaged_reference_is_written_again(server):
    server.files["large.bin"] = LARGE
    hub.fetch("owner/name", "large.bin")
    ref = hub.cache_folder("owner/name", False) / "refs" / "main"
    for damage in (b"\xff\xfe", b"../../../..", b"", b"\0" * 40):
        ref.write_bytes(damage)
        assert hub.fetch("owner/name", "large.bin").read_bytes() == LARGE
        assert ref.read_text() == COMMIT


def test_file_without_bytes_is_fetched(server):
    server.files["empty.txt"] = b""
    assert hub.fetch("owner/name", "empty.txt").read_bytes() == b""


def test_cache_without_symbolic_links_is_shared_with_huggingface_hub(server, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    server.files |= {"large.bin": LARGE, "small.txt": b"few"}
    cache = hub.constants.HF_HUB_CACHE
    for name, content in server.files.items():
        path = hub.fetch("owner/name", name)
        assert path.read_bytes() == content and not path.is_symlink()
        seen = len(server.seen)
        assert hub.fetch("owner/name", name) == path and len(server.seen) == seen
        found = huggingface_hub.hf_hub_download("owner/name", name, cache_dir=cache, local_files_only=True)
        assert Path(found) == path
    stored = [path for path in Path(cache).rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert stored == [hub.fetch("owner/name", "large.bin")]  # once


@pytest.mark.parametrize("name, value", [("HF_HOME", "~"), ("HF_HUB_CACHE", "$HOME/hub")])
def test_cache_folder_expands_home(tmp_path, name, value):
    """huggingface/huggingface_hub#2942: otherwise a folder called $HOME is made."""
    command = "from inputs import hub; print(hub.cache_folder('owner/name', False))"
    environment = {**os.environ, "HOME": str(tmp_path), name: value}
    ended = subprocess.run([sys.executable, "-c", command], env=environment, cwd=HERE, capture_output=True, text=True)
    assert ended.stdout == f"{tmp_path}/hub/models--owner--name\n"
