"""Files from the Hugging Face hub: fetched once, verified, and kept in the cache of the hub's own libraries.

The cache is $HF_HOME/hub: blobs/ named by checksum, snapshots/COMMIT/FILE linking to them, refs/ from a branch to its
commit. Files fetched by transformers or datasets are used here, and the reverse. These variables are honoured:
HF_ENDPOINT (a mirror), HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE.

Not here: uploading, listing, Xet's chunks (the hub also serves every file by plain HTTPS).
"""

import contextlib
import hashlib
import os
import re
import time
import urllib.parse
from pathlib import Path

import filelock
import requests
import urllib3

from checkpoints.huggingface import shards, weight_files
from runtime.cli import BadInput, progress
from runtime.files import atomic_write, sha256

TIMEOUT = (5, 8)  # seconds to connect, and between two pieces of a response
ATTEMPTS = 5  # at most about a minute in all, even if every attempt times out
BACKOFF = 0.5  # seconds before the second attempt; twice as long before each later one
RETRY_STATUSES = (408, 429, 500, 502, 503, 504)
MAX_RETRY_AFTER = 10  # seconds
CHUNK = 2**14  # bytes; an incomplete chunk is lost when the connection breaks


class RetryableError(Exception):
    """A download that may succeed at the next attempt."""


class NotOnHub(BadInput):
    """The hub responds, but does not have this file."""


class HubRetry(urllib3.Retry):
    """urllib3's retries of connections and statuses, except that a long Retry-After is an error."""

    def parse_retry_after(self, retry_after):
        try:
            seconds = super().parse_retry_after(retry_after)
        except urllib3.exceptions.InvalidHeader:
            return 0  # the usual back-off
        if seconds > MAX_RETRY_AFTER:
            raise BadInput(f"the hub is busy: try again in {seconds:.0f} seconds")
        return seconds


def fetch(repository, name, revision="main", dataset=False):
    """Path of the file `name` of the repository OWNER/NAME, from the cache or else from the hub.

    An interrupted download resumes, also in another run. A file is in the cache only if its checksum is the hub's. If
    two processes need the same repository, one fetches and the other waits.
    Raises NotOnHub if the repository has no such file, and BadInput if the file cannot be fetched: no network, offline
    mode, no permission, or a response that is not the file.
    """
    folder = cache_folder(repository, dataset)
    path = in_cache(folder, name, revision)
    if path is not None:
        return path
    what = f"{name} of {repository}"
    if offline():
        raise BadInput(f"{what} is not in the cache {folder}, and HF_HUB_OFFLINE forbids fetching it")
    path = f"{repository}/resolve/{urllib.parse.quote(revision, safe='')}/{urllib.parse.quote(name)}"
    url = f"{endpoint()}/{'datasets/' if dataset else ''}{path}"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".fetching"):
        return in_cache(folder, name, revision) or download(url, what, folder, name, revision)


def offline():
    """Whether HF_HUB_OFFLINE forbids fetching."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


VOCABULARY = ("tokenizer.json", "vocab.txt", "vocab.json")
VOCABULARY_MORE = ("merges.txt", "added_tokens.json", "tokenizer_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def fetch_model(repository, revision="main", alias=None):
    """Folder with a model's configuration, vocabulary and weights, all of one commit.

    alias: another name under which the hub's libraries may have cached the model. Raises BadInput as `fetch` does.
    """
    for name in (repository, alias or repository):
        config = in_cache(cache_folder(name, False), "config.json", revision)
        if config and is_model(config.parent):
            return config.parent
    folder = fetch(repository, "config.json", revision).parent
    revision = folder.name  # the commit: the branch may move while the other files are fetched
    for name in (*VOCABULARY, *VOCABULARY_MORE):
        with contextlib.suppress(NotOnHub):
            fetch(repository, name, revision)
    for name in WEIGHTS:  # last: if they are there, the model is complete
        with contextlib.suppress(NotOnHub):
            path = fetch(repository, name, revision)
            for shard in shards(path) if path.suffix == ".json" else ():
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
    """Folder of a repository in the hub's cache."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    root = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    return root / f"{'datasets' if dataset else 'models'}--{repository.replace('/', '--')}"


def in_cache(folder, name, revision):
    """Path of a file in the snapshot of a branch or commit; None if it is not there."""
    ref = folder / "refs" / revision
    commit = ref.read_text("utf8").strip() if ref.is_file() else revision
    path = folder / "snapshots" / commit / name
    return path if path.is_file() else None


def download(url, what, folder, name, revision):
    """Fetch `url` into the cache. Returns the path of the file in its snapshot.

    urllib3 retries failed connections and busy servers. The loop here retries what is wrong with a response: a body
    that breaks off, a wrong checksum, a location that has expired.
    """
    retry = HubRetry(ATTEMPTS - 1, backoff_factor=BACKOFF, status_forcelist=RETRY_STATUSES, raise_on_status=False)
    with requests.Session() as session:
        session.headers["Accept-Encoding"] = "identity"
        for scheme in ("https://", "http://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
        for attempt in range(ATTEMPTS):
            if attempt > 0:
                time.sleep(BACKOFF * 2 ** (attempt - 1))
            try:
                location, checksum, size, commit = head(session, url, what)
                blob = folder / "blobs" / checksum
                if not blob.is_file():
                    download_to(session, location, blob, checksum, size, name)
                return link_snapshot(folder, commit, name, blob, revision)
            except RetryableError as error:
                reason = error
            except requests.RequestException as error:
                status = getattr(error.response, "status_code", None)
                reason = f"status {status}" if status else type(error).__name__
                if status is None or status in RETRY_STATUSES:  # urllib3 has made all attempts
                    break
    host = urllib.parse.urlsplit(url).netloc
    raise BadInput(f"cannot fetch {what} from {host}: {reason}, {ATTEMPTS} attempts; try again, or set HF_ENDPOINT")


def link_snapshot(folder, commit, name, blob, revision):
    """Path of the commit's snapshot of a file, a link to its blob; `revision` then refers to the commit."""
    path = folder / "snapshots" / commit / name
    if not path.is_file():
        with atomic_write(path) as tmp_path:
            Path(tmp_path).unlink(missing_ok=True)  # of a run that was killed here
            os.symlink(os.path.relpath(blob, path.parent), tmp_path)
    if commit != revision:
        with atomic_write(folder / "refs" / revision) as tmp_path:
            Path(tmp_path).write_text(commit, "utf8")
    return path


def head(session, url, what):
    """(location, checksum, size in bytes, commit) of a file on the hub.

    The hub responds for a large file with a redirect to its storage and the sha256 in X-Linked-Etag, for a small file
    with git's sha1 in ETag.
    """
    location, headers = url, requests.structures.CaseInsensitiveDict()
    for _ in range(5):
        response = session.head(location, headers=authorization(location), timeout=TIMEOUT, allow_redirects=False)
        headers.update(response.headers)
        target = headers.pop("Location", "")
        location = urllib.parse.urljoin(location, target)
        if not re.match("/(?!/)", target):  # a path is followed: a renamed repository, or the hub's own cache
            break
    if response.status_code in (401, 403):
        raise BadInput(f"{what}: the hub refuses access ({response.status_code}); check the name and HF_TOKEN")
    if response.status_code == 404:
        raise NotOnHub(f"the hub has no {what} ({url})")
    response.raise_for_status()
    checksum = headers.get("X-Linked-Etag", headers.get("ETag", "")).removeprefix("W/").strip('"')
    size = headers.get("X-Linked-Size", headers.get("Content-Length", ""))
    commit = headers.get("X-Repo-Commit", "")
    is_file = re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", checksum) and re.fullmatch("[0-9a-f]{40}", commit)
    if not is_file or not size.isdecimal():
        raise RetryableError("a response without checksum, size and commit, such as a sign-in page")
    return location, checksum, int(size), commit


def download_to(session, location, blob, checksum, size, name):
    """Fetch `location` to the path `blob`, resuming what an earlier attempt has left beside it."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = blob.with_name(f"{blob.name}.incomplete")
    start = tmp_path.stat().st_size if tmp_path.is_file() else 0
    headers = authorization(location)
    if 0 < start < size:
        headers["Range"] = f"bytes={start}-"
    with session.get(location, headers=headers, timeout=TIMEOUT, stream=True) as response:
        response.raise_for_status()
        if response.status_code != 206:  # the whole file
            start = 0
        length, kind = response.headers.get("Content-Length"), response.headers.get("Content-Type")
        if length not in (None, str(size - start)):
            raise RetryableError(f"{length} bytes of {kind}, not the file")
        try:
            with open(tmp_path, "ab" if start else "wb") as file, progress(size, start, name, "B") as bar:
                with contextlib.suppress(requests.RequestException):  # the body broke off: what has arrived is kept
                    for chunk in response.iter_content(CHUNK):
                        file.write(chunk)
                        bar.update(len(chunk))
        except OSError as error:
            raise BadInput(f"cannot write {tmp_path}: {error.strerror or error}") from None
    found = tmp_path.stat().st_size
    if found < size:
        raise RetryableError(f"{found:,} of {size:,} bytes arrived")
    if found > size or file_checksum(tmp_path, checksum) != checksum:
        tmp_path.unlink()
        raise RetryableError("a wrong checksum")
    os.replace(tmp_path, blob)


def file_checksum(path, like):
    """The checksum of a file as the hub computes it: sha256 for large files, git's sha1 for small ones."""
    if len(like) == 64:
        return sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def endpoint():
    """The hub's address, or that of a mirror."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def authorization(url):
    """The header with HF_TOKEN, if it is set and `url` is on the hub itself."""
    token = os.environ.get("HF_TOKEN", "").strip()
    on_hub = urllib.parse.urlsplit(url).netloc == urllib.parse.urlsplit(endpoint()).netloc
    return {"Authorization": f"Bearer {token}"} if token and on_hub else {}
