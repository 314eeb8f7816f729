"""inputs/tokenizer.py and inputs/batches.py: token ids, packing, masking, padding. The oracle is transformers."""

import json
import shutil

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import data
from attacks import resources
from bert import Bert
from inputs.batches import Blocks, TokenizedSplit, length_sorted_batches, mask_tokens
from inputs.tokenizer import Tokenizer
from runtime.cli import BadInput
from tests.conftest import FAMILIES, LETTERS, MINILM, VOCABULARY, change, count_words, saved, token_ids


def test_masking_is_80_10_10_of_15_percent_without_special_tokens():
    tokenizer = Tokenizer(MINILM)
    ids = torch.randint(1000, 30000, (400, 128))
    ids[:, 0], ids[:, -1], ids[:, 100] = 101, 102, 0
    masked, positions, labels = mask_tokens(ids, tokenizer)
    assert torch.equal(ids.flatten()[positions], labels) and not {0, 101, 102, 103} & set(labels.tolist())
    assert len(labels) == round(0.15 * 400 * 125)
    changed = masked.flatten()[positions]
    assert (changed == 103).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (changed == labels).float().mean().item() == pytest.approx(0.1, abs=0.015)
    others = torch.ones(ids.numel(), dtype=torch.bool)
    others[positions] = False
    assert torch.equal(masked.flatten()[others], ids.flatten()[others])
    assert not torch.equal(mask_tokens(ids, tokenizer)[0], masked)


def test_packing_keeps_every_token_in_order_between_cls_and_sep(tiny):
    tokenizer = Tokenizer(tiny)
    documents = ["abc de", "f", "ghij klm nop"]
    packed = Blocks(tokenizer, documents, 20, "some", 5)
    blocks = packed.rows(torch.arange(len(packed)))
    expected = "a ##b ##c d ##e [SEP] f [SEP] g ##h ##i ##j k ##l ##m n ##o ##p [SEP]".split()
    stream = [tokenizer.library.id_to_token(i) for i in blocks[:, 1:-1].flatten().tolist()]
    assert stream == expected[: len(stream)] and len(expected) - len(stream) < 3
    assert (blocks[:, 0] == 2).all() and (blocks[:, -1] == 3).all() and blocks.shape[1] == 5
    with pytest.raises(BadInput, match="not enough for one block of 64"):
        Blocks(tokenizer, ["abc"], 3, "few", 64)
    again = Blocks(tokenizer, None, 20, "some", 5)  # from the cache, without documents
    assert torch.equal(again.rows(torch.tensor([2, 0])), blocks[[2, 0]]) and again.sha256 == packed.sha256
    counts = torch.bincount(torch.tensor([tokenizer.library.token_to_id(token) for token in expected]), minlength=60)
    assert torch.equal(packed.frequencies(60), counts)


def unusual_texts(count):
    """Real sentences, and texts with unusual characters."""
    generator = np.random.Generator(np.random.PCG64(0))
    texts = ["", " ", "\n", "a" * 10_000, "\u00e9" * 10_000, "\U0001f600" * 1000, "a<mask>b", "[ MASK ]", "don't  stop"]
    kinds = [
        "abcXYZ",
        "\u00e9\u00e0\u00fc\u00df\u00d1\u00c5",
        "\u4e2d\u6587\u30ab\u30ca\ud55c",
        "\U0001f600\U0001f469\u200d\U0001f467\ufe0f",
        "0123\u0663\u00bd\u2167",
    ]
    kinds += ["\x00\x01\x1f\x7f\x85\u200b\ufeff\u00ad\ufffd", " \t\n\r\u00a0\u3000\u2028", "!?.,;:'\"()[]{}<>@#$%^&*"]
    kinds += [
        "\u05d0\u05d1\u0e44",
        "a\u0301e\u0308\u0323",
        "\u0130\u0131\u017f\ufb01",
        "\U0001d518",
        ["[SEP]", "[MASK]"],
        ["<s>", " <mask> "],
    ]
    while len(texts) < count // 2:
        parts = [generator.choice(list(kinds[generator.integers(len(kinds))]), 5) for _ in range(4)]
        texts.append(" ".join("".join(part[: generator.integers(1, 6)]) for part in parts))
    return texts + [texts[0] for texts, _ in data.reviews("rotten_tomatoes")][: count - len(texts)]


@pytest.mark.parametrize("kind", ["uncased", "cased", "roberta"])
def test_token_ids_equal_transformers_on_real_and_unusual_texts(tmp_path, kind):
    texts = unusual_texts(2000)
    if kind == "roberta":
        library = tokenizers.ByteLevelBPETokenizer()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        library.train_from_iterator((texts[0] for texts, _ in data.bbc()), 3000, 2, False, special)
        library.save_model(str(tmp_path))
        files, settings = [str(tmp_path / name) for name in ("vocab.json", "merges.txt")], {}
        classes = transformers.RobertaTokenizer, transformers.RobertaTokenizerFast
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta", "vocab_size": 3000}))
    else:
        shutil.copy(MINILM / "vocab.txt", tmp_path)
        files, settings = [str(tmp_path / "vocab.txt")], {"do_lower_case": kind == "uncased"}
        classes = transformers.BertTokenizer, transformers.BertTokenizerFast
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    from_files = Tokenizer(tmp_path)
    from_files.save(tmp_path / "saved")
    shutil.copy(tmp_path / "config.json", tmp_path / "saved")
    for tokenizer in (from_files, Tokenizer(tmp_path / "saved")):
        found = token_ids(tokenizer, texts, 10_000)
        for reference in [of(*files, **settings) for of in classes] + [classes[1].from_pretrained(tmp_path / "saved")]:
            assert found == reference(texts, truncation=True, max_length=10_000)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_added_tokens_equal_transformers(tmp_path, family):
    saved(tmp_path, family=family)
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    slow = {"bert": transformers.BertTokenizer, "roberta": transformers.RobertaTokenizer}[family]
    reference = slow.from_pretrained(tmp_path)
    reference.add_tokens(["covidvax", "@USER", "[E1]"])
    reference.add_special_tokens({"additional_special_tokens": ["[E2]"]})  # not lowercased
    reference.save_pretrained(tmp_path)
    assert (tmp_path / "added_tokens.json").is_file() and not (tmp_path / "tokenizer.json").exists()
    sizes = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"vocab_size": len(reference)}))
    texts = ["get your covidvax", "@USER: the fox [e1]", "[E1][e2] [E2]covidvaxes", "the quick brown fox"]
    assert token_ids(Tokenizer(tmp_path), texts, 99) == reference(texts)["input_ids"]


OVERRIDES = [
    ("bert", {"do_lower_case": False}),
    ("bert", {"strip_accents": False}),
    ("bert", {"tokenize_chinese_chars": False}),
    ("bert", {"tokenizer_class": "BertTokenizer"}),  # the defaults of the class
    ("bert", {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}),  # which has none
    ("bert", {"additional_special_tokens": ["[E1]"]}),
    ("bert", {"added_tokens_decoder": {"4": {"content": "[MASK]", "lstrip": True, "special": True}}}),
    ("bert", {"added_tokens_decoder": {"57": {"content": "[E1]", "special": True}, "58": {"content": "ab"}}}),
    ("roberta", {"add_prefix_space": True}),
    ("roberta", {"add_prefix_space": False}),
    ("roberta", {}),
]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("family, settings", OVERRIDES)
def test_tokenizer_config_overrides_tokenizer_json_as_in_transformers(tmp_path, family, settings, flipped):
    saved(tmp_path, family=family)
    Tokenizer(tmp_path).save(tmp_path)
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    if flipped and family == "bert":
        parts["normalizer"] |= {"lowercase": False, "strip_accents": False, "handle_chinese_chars": False}
    elif flipped:
        parts["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    change(tmp_path, vocab_size=400)
    tokenizer, reference = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.save(tmp_path / "saved")
    shutil.copy(tmp_path / "config.json", tmp_path / "saved")
    texts = ["Ab \u00e9a\u0301 \u4e2da [MASK] x", "[E1] b [e1]ab abc", "the <mask>quick  fox", "quick"]
    for found in (tokenizer, Tokenizer(tmp_path / "saved")):
        assert token_ids(found, texts, 99) == reference(texts)["input_ids"]


def edit_tokenizer(folder, edit):
    """Save the tokenizer.json of a model after `edit` has changed its parts."""
    Tokenizer(folder).save(folder)
    parts = json.loads((folder / "tokenizer.json").read_text())
    edit(parts)
    (folder / "tokenizer.json").write_text(json.dumps(parts))


def vocabulary_with(number):
    return lambda folder: edit_tokenizer(folder, lambda parts: parts["model"]["vocab"].update({"z": number}))


def normalizer(**entries):
    return lambda folder: edit_tokenizer(folder, lambda parts: parts.update(normalizer=entries))


GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}
UNUSABLE = {
    "a word twice": (
        lambda f: (f / "vocab.txt").write_text("\n".join([*VOCABULARY, "a", "more"])),
        "has a token twice",
    ),
    "added to a word twice": (
        lambda f: [
            (f / "vocab.txt").write_text("\n".join([*VOCABULARY[:-1], "a"])),
            (f / "added_tokens.json").write_text('{"#fun": 57}'),
        ],
        "the added token '#fun' has the id 57, and would get 56",
    ),
    "an id of a million": (vocabulary_with(10**6), "has a token twice, or lacks one"),
    "an id of four thousand million": (vocabulary_with(4 * 10**9), "has a token twice, or lacks one"),
    "an id twice": (vocabulary_with(7), "has a token twice, or lacks one"),
    "an added token with a hole before it": (
        lambda f: (f / "added_tokens.json").write_text('{"#fun": 60}'),
        "the added token '#fun' has the id 60, and would get 57",
    ),
    "a normalizer that removes everything": (
        normalizer(type="Replace", pattern={"Regex": "."}, content=""),
        "returns no tokens for a text",
    ),
    "a normalizer that grows": (
        normalizer(type="Sequence", normalizers=15 * [GROWING]),
        "its normalizer can make a text 1,073,741,824 times as long",
    ),
    "texts cut on the left": (
        lambda f: (f / "tokenizer_config.json").write_text('{"truncation_side": "left"}'),
        "truncation_side 'left' in tokenizer_config.json is not supported",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_tokenizer_is_refused_in_one_line(tmp_path, case):
    damage, message = UNUSABLE[case]
    saved(tmp_path)
    damage(tmp_path)
    change(tmp_path, vocab_size=10**7)
    with pytest.raises(BadInput, match=message) as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_regular_expression_that_explodes_is_refused_in_one_line(tmp_path):
    saved(tmp_path)
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit_tokenizer(tmp_path, lambda parts: parts.update(pre_tokenizer=split))
    with pytest.raises(BadInput, match="fails on a text: .*retry-limit-in-match over"):
        token_ids(Tokenizer(tmp_path), ["a" * 40 + "b"], 64)


def test_documents_without_a_token_to_mask_are_left_out(tiny):
    tokenizer = Tokenizer(tiny)
    documents = ["\u200b", "abc", "\u200b\u200b", "[SEP] [CLS]", "d"]
    blocks = Blocks(tokenizer, documents, 99, "with empty ones", 8)
    assert [tokenizer.library.id_to_token(i) for i in blocks.rows(torch.tensor([0]))[0]] == (
        "[CLS] a ##b ##c [SEP] d [SEP] [SEP]".split()
    )
    with pytest.raises(BadInput, match="the corpus has 0 tokens, not enough for one block"):
        Blocks(tokenizer, ["\u200b"] * 1000, 3000, "only empty ones", 8)


def test_cased_vocabulary_is_recognized_by_its_words(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<S>", "<T>", "\u7403", "nba", "##s"]  # as Google's Chinese
    for more, expected in ((["nbas"], ["nba", "\u7403"]), (["NBAs"], ["[UNK]", "\u7403"])):
        (tmp_path / "vocab.txt").write_text("\n".join(words + more), "utf8")
        tokenizer = Tokenizer(tmp_path)
        assert tokenizer.library.encode("NBA\u7403", add_special_tokens=False).tokens == expected


def test_cached_encoding_keeps_segments_for_models_that_have_them(tmp_path):
    found = []
    for name, segments in (("one", 1), ("two", 2), ("again", 1)):
        saved(tmp_path / name, type_vocab_size=segments)
        rows = TokenizedSplit(Tokenizer(tmp_path / name), [(("a b", "c"), 0)], 24, torch.device("cpu"))
        found.append(rows.batch(torch.tensor([0]))[2])
    assert found[0] is None and found[1].tolist() == [[0, 0, 0, 0, 1, 1]] and found[2] is None


def test_roberta_model_may_have_a_bert_vocabulary(tmp_path):
    saved(tmp_path, family="roberta", pad_token_id=0)  # like klue/roberta-base: no segments, [CLS] instead of <s>
    (tmp_path / "bert").mkdir()
    saved(tmp_path / "bert")
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    Tokenizer(tmp_path / "bert").save(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rows = TokenizedSplit(tokenizer, [(("the quick", "fox"), 0)], 24, torch.device("cpu"))
    ids, _, segments, _ = rows.batch(torch.tensor([0]))
    assert segments is None and ids.tolist() == reference(["the quick"], ["fox"])["input_ids"]
    model, cpu = Bert.load(tmp_path, mlm=True), torch.device("cpu")
    masked = resources.MaskedWords(model, tokenizer, 57, count_words, cpu, torch.float32)  # the whole vocabulary
    assert set(LETTERS) < set(masked.substitutes("a b c", "a [MASK] c", "b", False))
    tokenizer.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["tokenizer_class"] == "BertTokenizer"


def test_batches_have_every_row_once_little_padding_and_an_order_by_seed():
    lengths = np.random.Generator(np.random.PCG64(0)).integers(3, 60, 5003)
    cut = [length_sorted_batches(lengths, 32, np.random.Generator(np.random.PCG64(seed))) for seed in (1, 1, 2)]
    for batches in (*cut, length_sorted_batches(lengths, 32, None)):
        assert sorted(np.concatenate(batches).tolist()) == list(range(5003))
        padded = sum(len(batch) * lengths[batch].max() for batch in batches)
        assert 1 - lengths.sum() / padded < 0.08
    assert all((a == b).all() for a, b in zip(cut[0], cut[1], strict=True))
    assert [b.tolist() for b in cut[0]] != [b.tolist() for b in cut[2]]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_segments_of_pairs_equal_transformers(tmp_path, family):
    saved(tmp_path, family=family)
    tokenizer = Tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    pairs = [("the quick", "fox"), ("a", ""), ("", "b c d"), ("brown " * 40, "fox " * 9)]
    rows = TokenizedSplit(tokenizer, [(pair, i) for i, pair in enumerate(pairs)], 24, torch.device("cpu"))
    ids, mask, segments, labels = rows.batch(torch.tensor([2, 0, 1, 3]))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chosen = [pairs[i] for i in (2, 0, 1, 3)]
    expected = reference(*map(list, zip(*chosen)), truncation=True, max_length=24, padding=True, return_tensors="pt")
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask.long(), expected["attention_mask"])
    assert labels.tolist() == [2, 0, 1, 3] and rows.num_truncated == 1
    assert segments is None if family == "roberta" else torch.equal(segments, expected["token_type_ids"])


def test_roberta_whose_padding_is_not_that_of_its_vocabulary_is_refused(tmp_path):
    """Its positions depend on which token is the padding (huggingface/transformers#34528)."""
    model = saved(tmp_path, family="roberta", pad_token_id=0)  # the id of <s>; <pad> has 1
    ids = torch.tensor([[0, 268, 275, 2]])
    with torch.no_grad():
        expected = model.roberta(ids, torch.ones_like(ids)).last_hidden_state
        assert (Bert.load(tmp_path).eval()(ids) - expected).abs().max() > 0.1
    with pytest.raises(BadInput, match="padding token has the id 1, config.json says 0"):
        Tokenizer(tmp_path)
