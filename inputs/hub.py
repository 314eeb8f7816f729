"""Files from the Hugging Face hub: fetched once, verified, and kept in the cache of the hub's own libraries.

The cache is $HF_HOME/hub: blobs/ are named by checksum, snapshots/COMMIT/FILE are links to them, and refs/ maps a
branch to its commit. Files that transformers or datasets fetched are reused, and vice versa. huggingface_hub reads
HF_ENDPOINT (a mirror), HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE; this module reads HF_TOKEN.

Not supported: uploading, listing, Xet's chunks (the hub also serves every file by plain HTTPS).
"""

import concurrent.futures
import contextlib
import hashlib
import os
import re
import shutil
import threading
import time
import urllib.parse
from pathlib import Path

import filelock
import requests
import urllib3
from huggingface_hub import constants

from checkpoints.huggingface import WEIGHTS, print_once, relative_path, shards, weight_files
from runtime.cli import BadInput, one_line, progress
from runtime.files import atomic_write, sha256, write_text

TIMEOUT = (5, 8)  # seconds to connect, and between two reads of a response
PATIENCE = 60  # seconds between two measurements of the rate
SLOWEST = 1000  # bytes a second
LARGEST_UNDECLARED = 2**25  # bytes: the largest file accepted if no header gives its size
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


def fetch(repository, name, revision="main", dataset=False):
    """Path of the file `name` of the repository OWNER/NAME, from the cache or else from the hub.

    An interrupted download resumes, even in another run. If two processes need a file, one fetches it and the other
    waits. Raises NotOnHub if the repository has no such file, BadInput if it cannot be fetched.
    """
    folder = cache_folder(repository, dataset)
    if path := in_cache(folder, name, revision):
        return path
    what = f"{name} of {repository}"
    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"{what} is not in the cache {folder}, and HF_HUB_OFFLINE forbids fetching it")
    place = f"{'datasets/' if dataset else ''}{repository}/resolve"
    url = f"{constants.ENDPOINT}/{place}/{urllib.parse.quote(revision, safe='')}/{urllib.parse.quote(name)}"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".fetching"):
        return in_cache(folder, name, revision) or download(url, what, folder, name, revision)


VOCABULARY = ("tokenizer.json", "vocab.txt", "vocab.json")
VOCABULARY_MORE = ("merges.txt", "added_tokens.json", "tokenizer_config.json")


def fetch_model(repository, revision="main", alias=None):
    """Folder with a model's configuration, vocabulary and weights, all of one commit.

    alias: another name under which the hub's libraries may have cached the model.
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
    """Whether a cache folder has intact weights and an intact vocabulary."""
    paths = [path for path in map(folder.joinpath, (*VOCABULARY, *VOCABULARY_MORE)) if path.is_file()]
    try:
        return any(path.name in VOCABULARY for path in paths) and all(map(is_intact, [*paths, *weight_files(folder)]))
    except BadInput:
        return False


def is_intact(path):
    """Whether a cached file has the checksum in its blob's name. A copy without a blob is not checked."""
    blob = path.resolve()
    if blob.parent.name != "blobs" or not re.fullmatch(CHECKSUM, blob.name):
        return True
    found = file_checksum(blob, blob.name)
    return found == blob.name or print_once(f"{blob} is damaged: its checksum is wrong, so it is not used")


def cache_folder(repository, dataset):
    """Folder of a repository in the hub's cache."""
    relative_path(repository, "repository")
    return Path(constants.HF_HUB_CACHE) / f"{'datasets' if dataset else 'models'}--{repository.replace('/', '--')}"


def in_cache(folder, name, revision):
    """Path of a file in the snapshot of a branch or commit; None if it is missing or damaged."""
    relative_path(name, "file name")
    relative_path(revision, "revision")
    ref = folder / "refs" / revision
    commit = ref.read_text("utf8", errors="replace").strip() if ref.is_file() else revision
    path = folder / "snapshots" / commit / name
    return path if re.fullmatch(COMMIT, commit) and path.is_file() and is_intact(path) else None


def download(url, what, folder, name, revision):
    """Fetch `url` into the cache. Returns the path of the file in its snapshot.

    urllib3 retries failed connections and busy servers; the loop here retries after invalid responses.
    """
    more = {"status_forcelist": RETRY_STATUSES, "raise_on_status": False, "retry_after_max": MAX_RETRY_AFTER}
    retry = urllib3.Retry(ATTEMPTS - 1, backoff_factor=BACKOFF, **more)
    tmp_path = folder / "blobs" / f"{hashlib.sha256(f'{revision}/{name}'.encode()).hexdigest()}.incomplete"
    tmp_path.parent.mkdir(parents=True, exist_ok=True)
    host = constants.ENDPOINT.rpartition("//")[2].rpartition("@")[2]
    with requests.Session() as session:
        session.headers["Accept-Encoding"], session.auth = "identity", authorization()
        for scheme in ("https://", "http://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
        for attempt in range(ATTEMPTS):
            if attempt > 0:
                time.sleep(BACKOFF * 2 ** (attempt - 1))
            try:
                blob, commit, is_new = in_time(lambda is_over: receive(session, url, what, tmp_path, is_over), tmp_path)
                if re.fullmatch(COMMIT, revision) and commit != revision:
                    print_once(f"{what}: {host} sent commit {commit}, not {revision} as asked")
                return link_snapshot(folder, commit, name, blob, revision, is_new)
            except RetryableError as error:
                reason = f"{error}, {ATTEMPTS} attempts; try again, or set HF_ENDPOINT"
            except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:  # all that requests raises
                reason, response = explain(error), getattr(error, "response", None)
                if response is None or response.status_code in (407, *RETRY_STATUSES):  # urllib3 has made all attempts
                    break
    raise BadInput(f"cannot fetch {what} from {host}: {reason}")


def receive(session, url, what, tmp_path, is_over):
    """Make one attempt. It resumes a partial download in `tmp_path`, and stops when the event `is_over` is set.

    The hub redirects a large file to its storage, with the sha256 in X-Linked-Etag; a small file has git's sha1 in
    ETag. Returns (path of the blob, its commit, whether it is new).
    """
    start = file_size(tmp_path)
    part = {"Range": f"bytes={start}-"} if start else {}
    with session.get(url, headers=part, timeout=TIMEOUT, stream=True) as response:
        headers = requests.structures.CaseInsensitiveDict()
        for hop in (response, *reversed(response.history)):  # the hub's own headers take precedence
            headers.update(hop.headers)
        if "X-Linked-Etag" not in headers and response.status_code in (401, 403):
            raise BadInput(f"{what}: the hub refuses access ({response.status_code}); check the name and HF_TOKEN")
        if "X-Linked-Etag" not in headers and response.status_code == 404:
            raise NotOnHub(f"the hub has no {what} ({url})")
        if response.status_code == 416:
            tmp_path.unlink(missing_ok=True)
            raise RetryableError("no such part of the file")
        response.raise_for_status()
        checksum = headers.get("X-Linked-Etag", response.headers.get("ETag", "")).removeprefix("W/").strip('"')
        commit, linked = headers.get("X-Repo-Commit", ""), headers.get("X-Linked-Size", "")
        length, kind = response.headers.get("Content-Length", ""), response.headers.get("Content-Type")
        is_identified = re.fullmatch(CHECKSUM, checksum) and re.fullmatch(COMMIT, commit)
        if not is_identified or not re.fullmatch("[0-9]{0,15},[0-9]{0,15}", f"{linked},{length}"):
            raise RetryableError("a response without checksum, size and commit, such as a sign-in page")
        blob = tmp_path.with_name(checksum)
        if blob.is_file() and is_intact(blob):
            return blob, commit, False
        start = start if response.status_code == 206 else 0  # else the whole file
        size = int(linked or start + int(length or LARGEST_UNDECLARED))
        if length and int(length) != size - start:
            raise RetryableError(f"{length} bytes of {kind}, not the file")
        if is_over.is_set():  # another attempt may write to the file
            raise RetryableError("no headers in time")
        with open(tmp_path, "ab" if start else "wb") as file, progress(size, start, what, "B") as bar:
            with contextlib.suppress(requests.RequestException):
                for chunk in response.iter_content(CHUNK):
                    if is_over.is_set() or file.tell() > size:
                        break
                    file.write(chunk)
                    bar.update(len(chunk))
    if file_checksum(tmp_path, checksum) != checksum:
        found = file_size(tmp_path)
        if found >= size:
            tmp_path.unlink()
        raise RetryableError("a wrong checksum" if found >= size else f"{found:,} of {size:,} bytes arrived")
    os.replace(tmp_path, blob)
    return blob, commit, True


def file_size(path):
    return path.stat().st_size if path.is_file() else 0


def in_time(work, path):
    """work(is_over). Raises RetryableError if the file at `path` grows by less than SLOWEST for a time of PATIENCE.

    A socket timeout limits the wait for one byte, not for all headers, nor for a body that arrives byte by byte.
    """
    future, is_over, before = concurrent.futures.Future(), threading.Event(), file_size(path)

    def run():
        try:
            future.set_result(work(is_over))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while not concurrent.futures.wait([future], PATIENCE).done:
            if abs(file_size(path) - before) < SLOWEST * PATIENCE:  # smaller than before: the download started over
                raise RetryableError(f"less than {SLOWEST:,} bytes a second for {PATIENCE} seconds")
            before = file_size(path)
    finally:
        is_over.set()
    return future.result()


def explain(error):
    """The root cause of an exception from requests, and the remedy."""
    cause = getattr(error.args[0] if error.args else error, "reason", error)
    cause = one_line(getattr(cause, "original_error", cause))
    if isinstance(error, requests.exceptions.ProxyError) or "407 Client Error" in cause:
        return f"{cause}; check the proxy in HTTPS_PROXY and HTTP_PROXY"
    if isinstance(error, requests.exceptions.SSLError) or "TLS CA certificate" in cause:
        return f"{cause}; set REQUESTS_CA_BUNDLE to a file with the certificates that you trust"
    if isinstance(error, requests.RequestException) and not isinstance(error, ValueError):
        cause = f"status {error.response.status_code}" if error.response is not None else type(error).__name__
        return f"{cause}, {ATTEMPTS} attempts; try again, or set HF_ENDPOINT"
    return f"{cause}; check HF_ENDPOINT" if isinstance(error, ValueError) else cause  # an invalid address


def link_snapshot(folder, commit, name, blob, revision, is_new):
    """Link a file of a commit's snapshot to its blob. Returns its path. A branch `revision` then refers to the commit.

    Without symbolic links the blob is moved there, or copied if another snapshot may use it, as in huggingface_hub.
    """
    path = folder / "snapshots" / commit / name
    if not path.is_file():
        with atomic_write(path) as tmp_path:
            Path(tmp_path).unlink(missing_ok=True)  # left by a killed run
            try:
                os.symlink(os.path.relpath(blob, path.parent), tmp_path)
            except OSError:
                (os.replace if is_new else shutil.copyfile)(blob, tmp_path)
    if not re.fullmatch(COMMIT, revision):
        write_text(folder / "refs" / revision, commit)
    return path


def file_checksum(path, like):
    """The checksum of a file as the hub computes it: sha256 for large files, git's sha1 for small ones."""
    if len(like) == 64:
        return sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def authorization():
    """A function that adds HF_TOKEN to a request. None without a token: ~/.netrc is used. requests drops the token when
    a redirect leads to another host."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch("[!-~]*", token):
        raise BadInput("HF_TOKEN has characters that a header cannot contain: copy it again from the hub's settings")

    def add_token(request):
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return add_token if token else None
