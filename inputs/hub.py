"""Files from the Hugging Face hub: fetched once, verified, and kept in the cache of the hub's own libraries.

The cache is $HF_HOME/hub: blobs/ named by checksum, snapshots/COMMIT/FILE linking to them, refs/ from a branch to its
commit. Files fetched by transformers or datasets are used here, and the reverse. These variables are honoured:
HF_ENDPOINT (a mirror), HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE.

Not here: uploading, listing, Xet's chunks (the hub also serves every file by plain HTTPS).
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import re
import reprlib
import shutil
import threading
import time
import urllib.parse
from pathlib import Path

import filelock
import requests
import urllib3

from checkpoints.huggingface import file_sha256, relative_path, shards, weight_files
from runtime.cli import BadInput, one_line, progress
from runtime.files import atomic_write, sha256

TIMEOUT = (5, 8)  # seconds to connect, and between two pieces of a response
PATIENCE = 60  # seconds for all headers of a response, and between two measurements of the rate of its body
SLOWEST = 1000  # bytes a second
ATTEMPTS = 5  # at most about a minute in all, even if every attempt times out
BACKOFF = 0.5  # seconds before the second attempt; twice as long before each later one
RETRY_STATUSES = (408, 429, 500, 502, 503, 504)
MAX_RETRY_AFTER = 10  # seconds
CHUNK = 2**14  # bytes; an incomplete chunk is lost when the connection breaks
COMMIT = "[0-9a-f]{40}"
CHECKSUM = "[0-9a-f]{40}|[0-9a-f]{64}"  # git's sha1 of a small file, sha256 of a large one


class RetryableError(Exception):
    """A download that may succeed at the next attempt."""


class NotOnHub(BadInput):
    """The hub responds, but does not have this file."""


class HubRetry(urllib3.Retry):
    """urllib3's retries of connections and statuses, except that a long Retry-After is an error."""

    def parse_retry_after(self, retry_after):
        try:
            seconds = super().parse_retry_after(retry_after)
        except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError, TypeError):  # such as the year 99999
            return 0  # the usual back-off
        if seconds > MAX_RETRY_AFTER:
            raise BadInput(f"the hub is busy: try again in {seconds:.0f} seconds")
        return seconds


class Session(requests.Session):
    """Redirects are left to `request`: requests reads the whole body of a redirect, however long, and any address."""

    def get_redirect_target(self, response):
        return None


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
    """Whether a folder of the cache has weights and a vocabulary, undamaged."""
    paths = [path for path in map(folder.joinpath, (*VOCABULARY, *VOCABULARY_MORE)) if path.is_file()]
    try:
        return any(path.name in VOCABULARY for path in paths) and all(map(is_intact, [*paths, *weight_files(folder)]))
    except BadInput:
        return False


def is_intact(path):
    """Whether a cached file has the checksum that its blob is named by. A copy without a blob is not checked."""
    blob = path.resolve()
    if blob.parent.name != "blobs" or not re.fullmatch(CHECKSUM, blob.name):
        return True
    found = file_sha256(blob) if len(blob.name) == 64 else file_checksum(blob, blob.name)
    return found == blob.name or report_damage(blob)


@functools.cache  # once
def report_damage(blob):
    print(f"{blob} is damaged, its content has another checksum: it is not used")


def cache_folder(repository, dataset):
    """Folder of a repository in the hub's cache."""
    relative_path(repository, "repository")
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    root = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    root = Path(os.path.expandvars(root)).expanduser()
    return root / f"{'datasets' if dataset else 'models'}--{repository.replace('/', '--')}"


def in_cache(folder, name, revision):
    """Path of a file in the snapshot of a branch or commit; None if it is not there, or damaged."""
    relative_path(name, "file name")
    relative_path(revision, "revision")
    ref = folder / "refs" / revision
    commit = ref.read_text("utf8", errors="replace").strip() if ref.is_file() else revision
    path = folder / "snapshots" / commit / name
    return path if re.fullmatch(COMMIT, commit) and path.is_file() and is_intact(path) else None


def download(url, what, folder, name, revision):
    """Fetch `url` into the cache. Returns the path of the file in its snapshot.

    urllib3 retries failed connections and busy servers. The loop here retries what is wrong with a response: a body
    that breaks off, a wrong checksum, a location that has expired.
    """
    retry = HubRetry(ATTEMPTS - 1, backoff_factor=BACKOFF, status_forcelist=RETRY_STATUSES, raise_on_status=False)
    with Session() as session:
        session.headers["Accept-Encoding"] = "identity"
        for scheme in ("https://", "http://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
        for attempt in range(ATTEMPTS):
            if attempt > 0:
                time.sleep(BACKOFF * 2 ** (attempt - 1))
            try:
                location, checksum, size, commit = head(session, url, what)
                blob = folder / "blobs" / checksum
                is_new = not (blob.is_file() and is_intact(blob))
                if is_new:
                    download_to(session, location, blob, checksum, size, name)
                return link_snapshot(folder, commit, name, blob, revision, is_new)
            except RetryableError as error:
                reason = f"{error}, {ATTEMPTS} attempts; try again, or set HF_ENDPOINT"
            except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:  # all that requests raises
                reason, response = explain(error), getattr(error, "response", None)
                if response is None or response.status_code in (407, *RETRY_STATUSES):  # urllib3 has made all attempts
                    break
    host = endpoint().rpartition("//")[2].rpartition("@")[2]
    raise BadInput(f"cannot fetch {what} from {host}: {reason}")


def explain(error):
    """The first cause of an exception of requests, and the remedy."""
    cause = getattr(error.args[0] if error.args else error, "reason", error)
    cause = one_line(getattr(cause, "original_error", cause))
    if isinstance(error, requests.exceptions.ProxyError) or "407 Client Error" in cause:
        return f"{cause}; check the proxy in HTTPS_PROXY and HTTP_PROXY"
    if isinstance(error, requests.exceptions.SSLError) or "TLS CA certificate" in cause:
        return f"{cause}; name a file with the certificates that you trust in REQUESTS_CA_BUNDLE"
    if isinstance(error, requests.RequestException) and not isinstance(error, ValueError):  # no invalid address
        cause = f"status {error.response.status_code}" if error.response is not None else type(error).__name__
        return f"{cause}, {ATTEMPTS} attempts; try again, or set HF_ENDPOINT"
    return cause


def link_snapshot(folder, commit, name, blob, revision, is_new):
    """Path of the commit's snapshot of a file, a link to its blob; `revision` then refers to the commit.

    On a file system without links the blob itself is moved there, or copied if it is not new and another snapshot may
    use it, as the hub's own library does.
    """
    path = folder / "snapshots" / commit / name
    if not path.is_file():
        with atomic_write(path) as tmp_path:
            Path(tmp_path).unlink(missing_ok=True)  # of a run that was killed here
            try:
                os.symlink(os.path.relpath(blob, path.parent), tmp_path)
            except OSError:
                (os.replace if is_new else shutil.copyfile)(blob, tmp_path)
    if commit != revision:
        with atomic_write(folder / "refs" / revision) as tmp_path:
            Path(tmp_path).write_text(commit, "utf8")
    return path


def request(session, method, url, may_follow, headers={}):
    """(the response, all headers on the way to it, the address to which the last redirect leads).

    may_follow: says of the Location of a redirect whether it is followed.
    """
    seen = requests.structures.CaseInsensitiveDict()
    for _ in range(5):
        response = in_time(
            session.request, method, url, headers=headers | authorization(url), timeout=TIMEOUT, stream=True
        )
        seen.update(response.headers)
        target = seen.pop("Location", "") if response.is_redirect else ""
        url = address(target, "Location", url)
        if not may_follow(target):
            break
        response.close()
    return response, seen, url


def in_time(function, *arguments, **options):
    """The result of a call within PATIENCE. A timeout of a socket ends the wait for a byte, but not for all headers."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(PATIENCE)
    except concurrent.futures.TimeoutError:
        raise RetryableError(f"no headers within {PATIENCE} seconds") from None


def address(url, source, base=""):
    """`url`, which `source` gives and which may be relative to `base`, as an absolute address."""
    with contextlib.suppress(ValueError):
        joined = urllib.parse.urljoin(base, url)
        parts = urllib.parse.urlsplit(joined)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return joined
    raise ValueError(f"{source} {reprlib.repr(url)} is not an address such as https://huggingface.co")


def head(session, url, what):
    """(location, checksum, size in bytes, commit) of a file on the hub.

    The hub responds for a large file with a redirect to its storage and the sha256 in X-Linked-Etag, for a small file
    with git's sha1 in ETag.
    """
    is_path = re.compile("/(?!/)").match  # is followed: a renamed repository, or the hub's own cache
    response, headers, location = request(session, "HEAD", address(url, "HF_ENDPOINT"), is_path)
    if response.status_code in (401, 403):
        raise BadInput(f"{what}: the hub refuses access ({response.status_code}); check the name and HF_TOKEN")
    if response.status_code == 404:
        raise NotOnHub(f"the hub has no {what} ({url})")
    response.raise_for_status()
    checksum = headers.get("X-Linked-Etag", headers.get("ETag", "")).removeprefix("W/").strip('"')
    size = headers.get("X-Linked-Size", headers.get("Content-Length", ""))
    commit = headers.get("X-Repo-Commit", "")
    expected = {CHECKSUM: checksum, COMMIT: commit, "[0-9]{1,15}": size}
    if not all(re.fullmatch(pattern, value) for pattern, value in expected.items()):
        raise RetryableError("a response without checksum, size and commit, such as a sign-in page")
    return location, checksum, int(size), commit


def download_to(session, location, blob, checksum, size, name):
    """Fetch `location` to the path `blob`, resuming what an earlier attempt has left beside it."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = blob.with_name(f"{blob.name}.incomplete")
    start = tmp_path.stat().st_size if tmp_path.is_file() else 0
    headers = {"Range": f"bytes={start}-"} if 0 < start < size else {}
    with request(session, "GET", location, bool, headers)[0] as response:
        response.raise_for_status()
        if response.status_code != 206:  # the whole file
            start = 0
        length, kind = response.headers.get("Content-Length"), response.headers.get("Content-Type")
        if length not in (None, str(size - start)):
            raise RetryableError(f"{length} bytes of {kind}, not the file")
        try:
            with open(tmp_path, "ab" if start else "wb") as file, progress(size, start, name, "B") as bar:
                with contextlib.suppress(requests.RequestException), minimum_rate(response, file):
                    for chunk in response.iter_content(CHUNK):
                        file.write(chunk)
                        bar.update(len(chunk))
                        if file.tell() > size:
                            break
        except OSError as error:
            raise BadInput(f"cannot write {tmp_path}: {error.strerror or error}") from None
    found = tmp_path.stat().st_size
    if found < size:
        raise RetryableError(f"{found:,} of {size:,} bytes arrived")
    if found > size or file_checksum(tmp_path, checksum) != checksum:
        tmp_path.unlink()
        raise RetryableError("a wrong checksum")
    os.replace(tmp_path, blob)


@contextlib.contextmanager
def minimum_rate(response, file):
    """Break off a response whose body arrives in `file` at less than SLOWEST for a time of PATIENCE."""
    is_over = threading.Event()

    def watch():
        before = file.tell()
        while not is_over.wait(PATIENCE):
            if file.tell() < before + SLOWEST * PATIENCE:
                with contextlib.suppress(OSError, ValueError):  # it has just ended
                    response.raw.shutdown()
                return
            before = file.tell()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


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
    """The header with HF_TOKEN, if it is set and `url` is on the hub itself, also by its scheme."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch("[!-~]*", token):
        raise BadInput("HF_TOKEN has characters that no header can carry: copy it again from the hub's settings")
    on_hub = urllib.parse.urlsplit(url)[:2] == urllib.parse.urlsplit(endpoint())[:2]
    return {"Authorization": f"Bearer {token}"} if token and on_hub else {}
