"""The tokenizers of BERT and RoBERTa, from a model's own files."""

import hashlib
import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken
from tokenizers.models import WordPiece
from tokenizers.processors import RobertaProcessing

from bert import Config
from runtime.cli import BadInput, one_line
from runtime.files import read_json, write_json, write_text

SPECIAL_TOKENS = {  # padding, unknown, before a text, after it, masked
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
}
# classes of transformers that read vocab.txt, or vocab.json with merges.txt, as this file does
SUPPORTED_CLASSES = tuple(
    f"{name}Tokenizer"
    for name in ("Bert", "DistilBert", "Electra", "ConvBert", "MobileBert", "LayoutLM", "Roberta", "Longformer", "Bart")
)


class Tokenizer:
    """WordPiece or byte-level BPE: texts <-> token ids.

    path: a model folder, or a file of its weights. The vocabulary is the first found of tokenizer.json, vocab.json with
    merges.txt (RoBERTa) and vocab.txt (BERT); the last two are extended by added_tokens.json.
    `pad`, `cls`, `sep` and `mask` are the ids of the special tokens, and `size` is the number of tokens. `family` says
    which special tokens the vocabulary has: klue/roberta-base is a RoBERTa with those of BERT.
    Raises BadInput if there is no vocabulary, if it lacks a special token or has more tokens than the model.
    """

    def __init__(self, path):
        self.folder, self.config = path if path.is_dir() else path.parent, Config.read(path)
        self.library = read_library(self.folder)
        self.size = self.library.get_vocab_size()
        families, id_of = (self.config.model_type, *SPECIAL_TOKENS), self.library.token_to_id
        self.family = next((of for of in families if id_of(SPECIAL_TOKENS[of][2]) is not None), families[0])
        for token in SPECIAL_TOKENS[self.family]:
            if id_of(token) is None:
                raise BadInput(f"the vocabulary in {self.folder} has no {token}: it is not a {self.family} vocabulary")
        self.pad, _, self.cls, self.sep, self.mask = map(id_of, SPECIAL_TOKENS[self.family])
        if self.size > self.config.vocab_size:
            raise BadInput(f"{self.folder}: the vocabulary has {self.size} tokens, the model {self.config.vocab_size}")
        self.library.no_padding()
        self.library.no_truncation()
        self.digest = hashlib.sha256(self.library.to_str().encode()).hexdigest()  # identifies how texts are tokenized

    def save(self, folder):
        """Write tokenizer.json, and tokenizer_config.json so that transformers loads an equal tokenizer."""
        parts = json.loads(self.library.to_str())
        if self.family == "bert":
            normalizer = parts.get("normalizer") or {}
            settings = {
                "tokenizer_class": "BertTokenizer",
                "do_lower_case": normalizer.get("lowercase", True),
                "strip_accents": normalizer.get("strip_accents"),
                "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
            }
        else:
            spaced = (parts.get("pre_tokenizer") or {}).get("add_prefix_space", False)
            settings = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": spaced}
        settings["model_max_length"] = self.config.max_length
        write_json(Path(folder) / "tokenizer_config.json", settings)
        write_text(Path(folder) / "tokenizer.json", self.library.to_str(pretty=True))


def read_library(folder):
    """The tokenizers library's object for the vocabulary in a model folder."""
    library = None
    try:
        if (folder / "tokenizer.json").is_file():
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        names = ("config.json", "tokenizer_config.json", "added_tokens.json")
        config, settings, added = (read_json(path) if path.is_file() else {} for path in map(folder.joinpath, names))
        kind = settings.get("tokenizer_class") or config.get("tokenizer_class") or SUPPORTED_CLASSES[0]
        kind = str(kind).removesuffix("Fast")
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            library = byte_level_bpe(folder, settings)
        elif (folder / "vocab.txt").is_file():
            library = word_piece(folder, settings)
        if library and kind in SUPPORTED_CLASSES:
            kinds = {entry.pop("content"): entry for entry in settings.get("added_tokens_decoder", {}).values()}
            words = [word for word in sorted(added, key=added.get) if library.token_to_id(word) is None]
            library.add_tokens([AddedToken(word, **kinds.get(word, {})) for word in words])
            return tokenizers.Tokenizer.from_str(library.to_str())
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"the vocabulary in {folder} cannot be read: {one_line(error)}") from None
    if library:
        raise BadInput(f"the vocabulary in {folder} is for a {kind}: without its tokenizer.json it cannot be read")
    raise BadInput(f"{folder} has no vocabulary: tokenizer.json, vocab.txt or vocab.json with merges.txt")


def word_piece(folder, settings):
    """BERT's tokenizer from vocab.txt.

    Google's archives have no tokenizer_config.json that says whether the vocabulary is cased. An uncased one has no
    capital letter except in its special tokens, such as [CLS] and <S>.
    """
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
    *plain, mask = SPECIAL_TOKENS["roberta"]
    tokenizer.add_special_tokens([*plain, AddedToken(mask, lstrip=True)])
    cls, sep = ((token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>"))
    tokenizer.post_processor = RobertaProcessing(sep, cls, trim_offsets=True, add_prefix_space=spaced)
    return tokenizer
