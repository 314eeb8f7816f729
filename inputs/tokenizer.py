"""The tokenizers of BERT and RoBERTa, from a model's own files."""

import hashlib
import json
import math
from pathlib import Path

import tokenizers
from tokenizers import AddedToken
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import RobertaProcessing

from bert import Config
from checkpoints.families import FAMILIES, SPECIAL_TOKENS, TOKENIZERS
from runtime.cli import BadInput, one_line
from runtime.files import read_json, write_json, write_text


class Tokenizer:
    """WordPiece or byte-level BPE: texts <-> token ids, the same as those of transformers.

    path: a model folder, or a file of its weights. The vocabulary is the first of these that exists: tokenizer.json,
    vocab.json with merges.txt (RoBERTa), vocab.txt (BERT). tokenizer_config.json overrides parts of it. `pad`, `cls`,
    `sep` and `mask` are ids. `family` is that of the special tokens: klue/roberta-base is a RoBERTa with BERT's.
    """

    def __init__(self, path):
        self.folder, self.config = path if path.is_dir() else path.parent, Config.read(path)
        self.library = read_library(self.folder)
        vocabulary = self.library.get_vocab()
        self.size = len(vocabulary)
        families = (FAMILIES[self.config.model_type].vocabulary, *SPECIAL_TOKENS)
        self.family = next((of for of in families if SPECIAL_TOKENS[of][2] in vocabulary), families[0])
        for token in SPECIAL_TOKENS[self.family]:
            if token not in vocabulary:
                raise BadInput(f"the vocabulary in {self.folder} has no {token}: it is not a {self.family} vocabulary")
        self.pad, _, self.cls, self.sep, self.mask = map(vocabulary.get, SPECIAL_TOKENS[self.family])
        if FAMILIES[self.config.model_type].positions_after_padding and self.pad != self.config.pad_token_id:
            reason = f"its padding token has the id {self.pad}, config.json says {self.config.pad_token_id}"
            raise BadInput(f"the vocabulary in {self.folder} does not fit: {reason}, which would shift the positions")
        if self.size > self.config.vocab_size:
            raise BadInput(f"{self.folder}: the vocabulary has {self.size} tokens, the model {self.config.vocab_size}")
        if sorted(vocabulary.values()) != list(range(self.size)):
            reason = f"the ids of its {self.size} tokens are not 0 to {self.size - 1}, each once"
            raise BadInput(f"the vocabulary in {self.folder} has a token twice, or lacks one: {reason}")
        self.library.no_padding()
        self.library.no_truncation()
        if not self.encode_batch(["a 1"], add_special_tokens=False)[0].ids:
            raise BadInput(f"the tokenizer in {self.folder} returns no tokens for a text: check its normalizer")
        self.digest = hashlib.sha256(self.library.to_str().encode()).hexdigest()  # identifies how texts are tokenized

    def encode_batch(self, texts, **options):
        """The library's encodings of texts or pairs. Raises BadInput if it fails, as in a regular expression."""
        try:
            return self.library.encode_batch_fast(texts, **options)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic in the library is not an Exception
            raise BadInput(f"the tokenizer in {self.folder} fails on a text: {one_line(error)}") from None

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, from which transformers loads an equal tokenizer."""
        if self.family == "bert":
            normalizer = self.library.normalizer
            settings = {
                "tokenizer_class": "BertTokenizer",
                "do_lower_case": getattr(normalizer, "lowercase", True),
                "strip_accents": getattr(normalizer, "strip_accents", None),
                "tokenize_chinese_chars": getattr(normalizer, "handle_chinese_chars", True),
            }
        else:
            spaced = getattr(self.library.pre_tokenizer, "add_prefix_space", False)
            settings = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": spaced}
        settings["model_max_length"] = self.config.max_length
        write_json(Path(folder) / "tokenizer_config.json", settings)
        write_text(Path(folder) / "tokenizer.json", self.library.to_str(pretty=True))


def read_library(folder):
    """The tokenizers library's object for the vocabulary in a model folder."""
    whole, names = folder / "tokenizer.json", ("config.json", "tokenizer_config.json", "added_tokens.json")
    try:
        config, settings, added = (read_json(path) if path.is_file() else {} for path in map(folder.joinpath, names))
        family = FAMILIES.get(config.get("model_type"), FAMILIES["bert"])
        default = TOKENIZERS[family.vocabulary][0]
        kind = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or default).removesuffix("Fast")
        added = {number: {"content": word} for word, number in added.items()}
        if whole.is_file():
            library = tokenizers.Tokenizer.from_file(str(whole))
            added |= {token.pop("id"): token for token in read_json(whole).get("added_tokens", [])}
        elif kind not in sum(TOKENIZERS.values(), ()):
            raise BadInput(f"it is for a {kind}, which needs its tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            library = byte_level_bpe(folder, settings)
        elif (folder / "vocab.txt").is_file():
            library = word_piece(folder, settings)
        else:
            raise BadInput("it has no tokenizer.json, vocab.txt or vocab.json with merges.txt")
        override(library, kind, settings)
        add_tokens(library, settings.get("added_tokens_decoder", added), settings)
        return library
    except Exception as error:  # the library raises bare Exception
        reason = error if isinstance(error, BadInput) else one_line(error)
        raise BadInput(f"the vocabulary in {folder} cannot be read: {reason}") from None


def override(library, kind, settings):
    """Let tokenizer_config.json override tokenizer.json. As in transformers, so do the defaults of missing settings."""
    for name, supported in (("split_special_tokens", False), ("truncation_side", "right")):
        if settings.get(name, supported) != supported:
            raise BadInput(f"{name} {settings[name]!r} in tokenizer_config.json is not supported, only {supported!r}")
    normalizer, pre_tokenizer = library.normalizer, library.pre_tokenizer
    if isinstance(normalizer, BertNormalizer) and kind in TOKENIZERS["bert"]:
        normalizer.lowercase = settings.get("do_lower_case", True)
        normalizer.strip_accents = settings.get("strip_accents")
        normalizer.handle_chinese_chars = settings.get("tokenize_chinese_chars", True)
    if isinstance(pre_tokenizer, ByteLevel):
        pre_tokenizer.add_prefix_space = settings.get("add_prefix_space", False)
    growth = longest_growth(json.loads(normalizer.__getstate__())) if normalizer else 1
    if growth > 100:
        raise BadInput(f"its normalizer can make a text {growth:,} times as long")


def longest_growth(normalizer):
    """The largest factor by which a normalizer, as described in tokenizer.json, can lengthen a text."""
    inserted = normalizer.get("content", normalizer.get("prepend", ""))
    return max(1, len(inserted)) * math.prod(map(longest_growth, normalizer.get("normalizers", [])))


def add_tokens(library, added, settings):
    """Add the tokens {id: its settings}, and the special tokens of tokenizer_config.json that are not among them."""
    library.add_tokens([AddedToken(**added[number]) for number in sorted(added, key=int)])
    for number, token in added.items():
        found = library.token_to_id(token["content"])
        if found != int(number):  # its embedding would be another token's
            raise BadInput(f"the added token {token['content']!r} has the id {number}, and would get {found}")
    special = [settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    special += settings.get("additional_special_tokens") or []
    special = [token["content"] if isinstance(token, dict) else token for token in special if token]
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    library.add_special_tokens([token for token in special if token not in known])


def word_piece(folder, settings):
    """BERT's tokenizer from vocab.txt. Google's archives do not say whether it is cased: an uncased vocabulary has no
    capital letter except in its special tokens, such as [CLS] and <S>."""
    vocabulary = WordPiece.read_file(str(folder / "vocab.txt"))
    uncased = all(token == token.lower() for token in vocabulary if token[:1] not in ("[", "<"))
    settings.setdefault("do_lower_case", uncased)
    return tokenizers.BertWordPieceTokenizer(vocabulary)._tokenizer


def byte_level_bpe(folder, settings):
    """RoBERTa's tokenizer from vocab.json and merges.txt."""
    tokenizer = tokenizers.ByteLevelBPETokenizer.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    *plain, mask = SPECIAL_TOKENS["roberta"]
    tokenizer.add_special_tokens([*plain, AddedToken(mask, lstrip=True)])
    cls, sep = ((token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>"))
    tokenizer.post_processor = RobertaProcessing(sep, cls, add_prefix_space=settings.get("add_prefix_space", False))
    return tokenizer._tokenizer
