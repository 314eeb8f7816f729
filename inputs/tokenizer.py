"""The tokenizers of BERT and RoBERTa from a model's own files."""

import hashlib
import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken
from tokenizers.models import WordPiece
from tokenizers.processors import RobertaProcessing

from bert import Config
from runtime.cli import BadInput, one_line
from runtime.files import atomic_write, write_json

# the special tokens of each family: padding, unknown, before a text, after it, masked
SPECIAL = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
}
# transformers' classes that make of these files what is made of them here
CLASSES = tuple(
    f"{name}Tokenizer"
    for name in ("Bert", "DistilBert", "Electra", "ConvBert", "MobileBert", "LayoutLM", "Roberta", "Longformer", "Bart")
)


class Tokenizer:
    """WordPiece or byte-level BPE from a model's own files: texts <-> token ids.

    `pad`, `cls`, `sep` and `mask` are the ids of the special tokens, `size` how many tokens there are. It takes what
    is there of tokenizer.json, vocab.json with merges.txt (RoBERTa), vocab.txt (BERT), these two with the words that
    added_tokens.json adds. `family`: whose special tokens it has; klue/roberta-base is a RoBERTa with BERT's.
    Raises BadInput where there is none, it lacks a special token, or it knows more tokens than the model.
    """

    def __init__(self, path):
        """path: of the model, its folder or a file of its weights."""
        self.folder, self.config = path if path.is_dir() else path.parent, Config.read(path)
        self.library = self.read()
        self.size = self.library.get_vocab_size()
        families = self.config.model_type, *SPECIAL
        known = (of for of in families if self.library.token_to_id(SPECIAL[of][2]) is not None)
        self.family = next(known, self.config.model_type)
        special = SPECIAL[self.family]
        for token in special:
            if self.library.token_to_id(token) is None:
                raise BadInput(f"the vocabulary in {self.folder} has no {token}: it is no {self.family}'s")
        self.pad, _, self.cls, self.sep, self.mask = (self.library.token_to_id(token) for token in special)
        if self.size > self.config.vocab_size:
            raise BadInput(
                f"the vocabulary in {self.folder} has {self.size} tokens, the model {self.config.vocab_size}: "
                "they do not belong together"
            )
        self.library.no_padding()
        self.library.no_truncation()
        self.digest = hashlib.sha256(self.library.to_str().encode()).hexdigest()  # tells what it makes of a text

    def read(self):
        """The tokenizers library's object."""
        folder, library = self.folder, None
        try:
            if (folder / "tokenizer.json").is_file():
                return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            settings, added = (read_json(folder / name) for name in ("tokenizer_config.json", "added_tokens.json"))
            kind = (
                settings.get("tokenizer_class")
                or read_json(folder / "config.json").get("tokenizer_class")
                or CLASSES[0]
            )
            kind = str(kind).removesuffix("Fast")
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                library = byte_level_bpe(folder, settings)
            elif (folder / "vocab.txt").is_file():
                library = word_piece(folder, settings)
            if library and kind in CLASSES:
                kinds = {of.pop("content"): of for of in settings.get("added_tokens_decoder", {}).values()}
                words = [word for word in sorted(added, key=added.get) if library.token_to_id(word) is None]
                library.add_tokens([AddedToken(word, **kinds.get(word, {})) for word in words])
                return tokenizers.Tokenizer.from_str(library.to_str())
        except Exception as error:  # the library raises bare Exception
            raise BadInput(f"the vocabulary in {folder} cannot be read: {one_line(error)}") from None
        if library:
            raise BadInput(f"the vocabulary in {folder} is for a {kind}: without its tokenizer.json it cannot be read")
        raise BadInput(f"{folder} has no vocabulary: tokenizer.json, vocab.txt or vocab.json with merges.txt")

    def save(self, folder):
        """tokenizer.json, and tokenizer_config.json so that transformers makes the same of it."""
        parts = json.loads(self.library.to_str())
        settings = {"model_max_length": self.config.max_length}
        if self.family == "bert":
            normalizer = parts.get("normalizer") or {}
            settings |= {"tokenizer_class": "BertTokenizer", "do_lower_case": normalizer.get("lowercase", True)}
            settings |= {"strip_accents": normalizer.get("strip_accents")}
            settings |= {"tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True)}
        else:
            splitter = parts.get("pre_tokenizer") or {}
            settings |= {"tokenizer_class": "RobertaTokenizer"}
            settings |= {"add_prefix_space": splitter.get("add_prefix_space", False)}
        write_json(Path(folder) / "tokenizer_config.json", settings)
        with atomic_write(Path(folder) / "tokenizer.json") as tmp_path:
            Path(tmp_path).write_text(self.library.to_str(pretty=True), "utf8")


def read_json(path):
    """What a JSON file says, {} where it is not there."""
    return dict(json.loads(path.read_text("utf8"))) if path.is_file() else {}


def word_piece(folder, settings):
    """BERT's tokenizer from vocab.txt. Where no tokenizer_config.json says whether it is cased, as in Google's own
    archives, the vocabulary does: an uncased one has no capital letter outside its special tokens, [CLS] or <S>."""
    vocabulary = WordPiece.read_file(str(folder / "vocab.txt"))
    uncased = all(token == token.lower() for token in vocabulary if token[:1] not in ("[", "<"))
    return tokenizers.BertWordPieceTokenizer(
        vocabulary,
        lowercase=settings.get("do_lower_case", uncased),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )


def byte_level_bpe(folder, settings):
    """RoBERTa's tokenizer from vocab.json and merges.txt."""
    spaced = settings.get("add_prefix_space", False)
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer = tokenizers.ByteLevelBPETokenizer.from_file(*files, add_prefix_space=spaced, trim_offsets=True)
    *plain, mask = SPECIAL["roberta"]
    tokenizer.add_special_tokens([*plain, AddedToken(mask, lstrip=True)])
    cls, sep = ((token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>"))
    tokenizer.post_processor = RobertaProcessing(sep, cls, trim_offsets=True, add_prefix_space=spaced)
    return tokenizer
