"""Files from the Hugging Face hub: fetched once, verified, and kept where the hub's own libraries keep theirs.

The cache is theirs, $HF_HOME/hub: blobs/ named by checksum, snapshots/COMMIT/FILE pointing to them, refs/ from a
branch to its commit. What transformers or datasets have fetched is used, and what is fetched here they use. Honoured:
HF_ENDPOINT (a mirror), HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE.

Left out: uploading, listing, Xet's chunks (the hub serves every file by plain HTTPS as well).
"""

import contextlib
import email.utils
import hashlib
import os
import re
import time
import urllib.parse
from pathlib import Path

import filelock
import requests

from checkpoints.huggingface import shards, weight_files
from runtime.cli import BadInput, progress
from runtime.files import atomic_write, sha256

TIMEOUT = (5, 8)  # seconds to connect, and between two pieces of an answer
ATTEMPTS = 5  # then the hub counts as gone: at most a minute, were every one of them to time out
LONGEST_WAIT = 10  # seconds that a busy hub's Retry-After may ask for
CHUNK = 2**14  # bytes; what is begun of one is lost when the connection breaks


class RetryableError(Exception):
    """What may be better at the next attempt. `wait`: the seconds that the hub asks for before it."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


class NotOnHub(BadInput):
    """The hub answers, and has no such file."""


def fetch(repository, name, revision="main", dataset=False):
    """The path of the file `name` of a repository OWNER/NAME, from the cache, else from the hub.

    Raises Missing where the repository has no such file, BadInput where it cannot be had: no network, offline mode,
    no permission, or an answer that is not the file. A broken download goes on from where it broke, also in another
    run; a file counts as there only when its checksum is the hub's. Of two processes that ask at once, one fetches.
    """
    folder = cache_folder(repository, dataset)
    path = in_cache(folder, name, revision)
    if path is None:
        what = f"{name} of {repository}"
        if offline():
            raise BadInput(f"{what} is not in the cache {folder}, and HF_HUB_OFFLINE forbids fetching it")
        endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        kind = "datasets/" if dataset else ""
        url = (
            f"{endpoint}/{kind}{repository}/resolve/{urllib.parse.quote(revision, safe='')}/{urllib.parse.quote(name)}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".fetching"):
            path = in_cache(folder, name, revision) or download(url, what, folder, name, revision)
    return path


def offline():
    """Whether the user forbids fetching."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


VOCABULARY = ("tokenizer.json", "vocab.txt", "vocab.json")
VOCABULARY_MORE = ("merges.txt", "added_tokens.json", "tokenizer_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def fetch_model(repository, revision="main", alias=None):
    """The folder with a model's configuration, vocabulary and weights, in whichever format it has them.

    alias: another name under which the hub's libraries may have cached it. Raises BadInput as `fetch` does.
    """
    for name in (repository, alias or repository):
        config = in_cache(cache_folder(name, False), "config.json", revision)
        if config and is_model(config.parent):
            return config.parent
    folder = fetch(repository, "config.json", revision).parent
    revision = folder.name  # the commit, though the branch may move meanwhile
    for name in (*VOCABULARY, *VOCABULARY_MORE):
        with contextlib.suppress(NotOnHub):
            fetch(repository, name, revision)
    for name in WEIGHTS:  # last: where they are, the model is whole
        with contextlib.suppress(NotOnHub):
            path = fetch(repository, name, revision)
            for shard in sorted(set(shards(path).values())) if path.suffix == ".json" else ():
                fetch(repository, shard, revision)
            return folder
    raise BadInput(f"the hub's {repository} has no weights that bert.py reads: none of {', '.join(WEIGHTS)}")


def is_model(folder):
    """Whether a folder of the cache has weights and a vocabulary."""
    try:
        return any((folder / name).is_file() for name in VOCABULARY) and weight_files(folder)
    except BadInput:
        return False


def cache_folder(repository, dataset):
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    root = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    return root / f"{'datasets' if dataset else 'models'}--{repository.replace('/', '--')}"


def in_cache(folder, name, revision):
    """The path in the newest snapshot of a branch, or in that of a commit; None where it is not there."""
    reference = folder / "refs" / revision
    commit = reference.read_text("utf8").strip() if reference.is_file() else revision
    path = folder / "snapshots" / commit / name
    return path if path.is_file() else None


def download(url, what, folder, name, revision):
    """Fetch `url` into the cache; the path of the snapshot's file."""
    trouble = None
    for attempt in range(ATTEMPTS):
        if trouble is not None:
            time.sleep(min(2.0**attempt / 4, 4) if trouble.wait is None else trouble.wait)
        try:
            place, checksum, size, commit = head(url, what)
            blob = folder / "blobs" / checksum
            if not blob.is_file():
                download_to(place, url, blob, checksum, size, name)
            break
        except requests.RequestException as error:
            trouble = RetryableError(what_broke(error))
        except RetryableError as error:
            trouble = error
    else:
        host = urllib.parse.urlsplit(url).netloc
        raise BadInput(f"{what} cannot be had from {host}: {trouble}, {ATTEMPTS} times; try again, or set HF_ENDPOINT")
    path = folder / "snapshots" / commit / name
    if not path.is_file():
        with atomic_write(path) as tmp_path:
            Path(tmp_path).unlink(missing_ok=True)  # of a run that was killed here
            os.symlink(os.path.relpath(blob, path.parent), tmp_path)
    if commit != revision:
        with atomic_write(folder / "refs" / revision) as tmp_path:
            Path(tmp_path).write_text(commit, "utf8")
    return path


def head(url, what):
    """(address, checksum, size, commit): the hub answers for a large file with where it is and its sha256."""
    where, found = url, {}
    for _ in range(5):
        headers = {"Accept-Encoding": "identity", **authorization()}
        answer = requests.head(where, headers=headers, timeout=TIMEOUT, allow_redirects=False)
        found |= {name.lower(): value for name, value in answer.headers.items()}
        target = found.pop("location", "")
        where = urllib.parse.urljoin(where, target)
        if not re.match("/(?!/)", target):  # elsewhere, or nowhere: a path is a renamed repository, or the hub's cache
            break
    if answer.status_code in (401, 403):
        raise BadInput(f"{what}: the hub refuses it ({answer.status_code}); does the name exist, is HF_TOKEN set?")
    if answer.status_code == 404:
        raise NotOnHub(f"the hub has no {what} ({url})")
    raise_for_status(answer)
    checksum = (found.get("x-linked-etag") or found.get("etag", "")).removeprefix("W/").strip('"')
    size = found.get("x-linked-size") or found.get("content-length", "")
    commit = found.get("x-repo-commit", "")
    whole = re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", checksum) and re.fullmatch("[0-9a-f]{40}", commit)
    if not whole or not size.isdecimal():
        raise RetryableError("an answer without checksum, size and commit, as of a sign-in page")
    return where, checksum, int(size), commit


def raise_for_status(answer):
    """Raise Trouble for a status that says that something is wrong."""
    if answer.status_code < 400:
        return
    wait = seconds_of(answer.headers.get("Retry-After", ""))
    if wait is not None and wait > LONGEST_WAIT:
        raise BadInput(f"{urllib.parse.urlsplit(answer.url).netloc} is busy: try again in {wait:.0f} seconds")
    raise RetryableError(f"status {answer.status_code}", wait)


def what_broke(error):
    """An exception of requests in words."""
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    return "no connection" if isinstance(error, requests.ConnectionError) else type(error).__name__


def seconds_of(retry_after):
    """Retry-After is a number of seconds or a date; None for anything else."""
    if retry_after.isdecimal():
        return int(retry_after)
    date = email.utils.parsedate_tz(retry_after)
    return max(0, email.utils.mktime_tz(date) - time.time()) if date else None


def download_to(place, url, blob, checksum, size, name):
    """Fetch `place` to `blob`, going on from what an earlier attempt has left beside it."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = blob.with_name(f"{blob.name}.incomplete")
    have = tmp_path.stat().st_size if tmp_path.is_file() else 0
    if have >= size:
        tmp_path.unlink()
        have = 0
    same_host = urllib.parse.urlsplit(place).netloc == urllib.parse.urlsplit(url).netloc
    headers = {"Accept-Encoding": "identity", **(authorization() if same_host else {})}
    headers |= {"Range": f"bytes={have}-"} if have else {}
    with requests.get(place, headers=headers, timeout=TIMEOUT, stream=True) as answer:
        raise_for_status(answer)
        if answer.status_code != 206:
            have = 0  # the whole file again
        if answer.headers.get("Content-Length") not in (None, str(size - have)):
            raise RetryableError(
                f"{answer.headers['Content-Length']} bytes of {answer.headers.get('Content-Type')}, not the file"
            )
        bar = progress(size, have, name, "B")
        with open(tmp_path, "ab" if have else "wb") as file, bar:
            for chunk in answer.iter_content(CHUNK):
                try:
                    file.write(chunk)
                except OSError as error:
                    raise BadInput(f"cannot write {tmp_path}: {error.strerror or error}") from None
                bar.update(len(chunk))
    found = tmp_path.stat().st_size
    if found != size or digest(tmp_path, checksum) != checksum:
        if found >= size:
            tmp_path.unlink()
        raise RetryableError(f"{found:,} of {size:,} bytes" if found != size else "a wrong checksum")
    os.replace(tmp_path, blob)


def digest(path, like):
    """The checksum of a file as the hub counts it: sha256 of large ones, git's sha1 of small ones."""
    if len(like) == 64:
        return sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def authorization():
    token = os.environ.get("HF_TOKEN", "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}
