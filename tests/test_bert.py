"""bert.py beyond the specification: random configurations, MiniLM, padding, single positions, saving."""

import numpy as np
import pytest
import torch
import transformers

from bert import CLS_ONLY, Bert
from checkpoints import huggingface
from checkpoints.families import FAMILIES as TABLE
from checkpoints.families import Family
from inputs.tokenizer import Tokenizer
from tests.conftest import FAMILIES, MINILM, VOCABULARY, inputs, saved, states_equal


def random_sizes(family, generator):
    """(length of a text, random configuration of a family)."""
    heads, longest = int(generator.integers(1, 6)), int(generator.integers(3, 90))
    offset = 2 if family == "roberta" else 0
    return longest, {
        "num_attention_heads": heads,
        "hidden_size": heads * int(generator.integers(1, 12)),
        "num_hidden_layers": int(generator.integers(1, 5)),
        "intermediate_size": int(generator.integers(1, 150)),
        "vocab_size": int(generator.integers(300, 700)),
        "max_position_embeddings": longest + offset,
        "type_vocab_size": 2 - offset // 2,
        "layer_norm_eps": float(generator.choice([1e-12, 1e-5, 1e-3])),
        "tie_word_embeddings": bool(generator.integers(0, 2)),
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_configurations_equal_transformers(tmp_path, family, seed):
    longest, sizes = random_sizes(family, np.random.Generator(np.random.PCG64(seed)))
    for kind in ("mlm", "classes"):
        reference = saved(tmp_path / kind, FAMILIES[family][kind], family, num_labels=2 + seed, **sizes)
        ids, mask, segments = inputs(reference.config, 3, longest)
        ids = ids.clamp(min=5)  # transformers counts RoBERTa's positions by the tokens that are not padding
        ids = torch.where(mask, ids, reference.config.pad_token_id)
        if kind == "mlm":
            states_equal(Bert.load(tmp_path / kind, mlm=True).eval(), reference, ids, mask, segments)
        else:
            with torch.no_grad():
                expected = reference(ids, mask.long(), None if family == "roberta" else segments).logits
                found = Bert.load(tmp_path / kind).eval().class_logits(ids, mask, segments)
            torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("length", [1, 19, 512])
def test_the_real_minilm_equals_transformers(length):
    reference = transformers.BertForMaskedLM.from_pretrained(MINILM, attn_implementation="eager").eval()
    model = Bert.load(MINILM, mlm=True).eval()
    assert model.initialized == ["mlm_head"]
    found, _ = huggingface.from_huggingface(reference.state_dict(), "bert", 6, "")
    model.load_state_dict({name: found[name] for name in model.state_dict()})
    states_equal(model, reference, *inputs(reference.config, 2, length))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_of_the_first_tokens_equal_those_among_all(tiny, checkpointing):
    model = Bert.load(tiny).eval()
    model.checkpointing = checkpointing
    ids, mask, segments = inputs(model.config, 3, 9)
    c = torch.rand(2, 3, requires_grad=True), torch.rand(2, 40, requires_grad=True)
    among, alone = model(ids, mask, segments, gates=c)[:, 0], model(ids, mask, segments, CLS_ONLY, c)
    torch.testing.assert_close(alone, among, atol=1e-5, rtol=1e-5)
    parameters = [*c, *model.layers.parameters(), *model.word_embeddings.parameters()]
    wanted, found = (torch.autograd.grad(states.square().sum(), parameters) for states in (among, alone))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, mask, segments, CLS_ONLY, c), alone, atol=1e-5, rtol=1e-5)


def test_padding_never_changes_a_real_token(tiny):
    model = Bert.load(tiny).eval()
    ids = torch.randint(5, 50, (2, 9))
    padded = torch.cat([ids, torch.randint(0, 50, (2, 4))], 1)
    mask = torch.arange(13).expand(2, 13) < 9
    torch.testing.assert_close(model(padded, mask)[:, :9], model(ids), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(model(padded, torch.zeros(2, 13))).all()


def test_a_saved_full_model_is_a_transformers_checkpoint(tiny, tmp_path):
    model = Bert.load(tiny, mlm=True, num_labels=3).eval()
    model.save(tmp_path, ("a", "b", "c"), {})
    theirs, report = transformers.BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    ids, mask, segments = inputs(model.config, 3, 9)
    with torch.no_grad():
        expected = theirs.eval()(ids, mask.long(), segments).logits
    torch.testing.assert_close(model.class_logits(ids, mask, segments), expected, atol=1e-5, rtol=1e-5)


DISTILBERT = Family(
    "DistilBert",
    encoder={
        "embeddings.word_embeddings": "word_embeddings",
        "embeddings.position_embeddings": "position_embeddings",
        "embeddings.LayerNorm": "embedding_norm",
        "transformer.layer.{}.attention.q_lin": "layers.{}.query",
        "transformer.layer.{}.attention.k_lin": "layers.{}.key",
        "transformer.layer.{}.attention.v_lin": "layers.{}.value",
        "transformer.layer.{}.attention.out_lin": "layers.{}.attention_output",
        "transformer.layer.{}.sa_layer_norm": "layers.{}.attention_norm",
        "transformer.layer.{}.ffn.lin1": "layers.{}.intermediate",
        "transformer.layer.{}.ffn.lin2": "layers.{}.output",
        "transformer.layer.{}.output_layer_norm": "layers.{}.output_norm",
    },
    heads={
        "pre_classifier": "pooler",
        "classifier": "classifier",
        "vocab_transform": "mlm_head.dense",
        "vocab_layer_norm": "mlm_head.norm",
        "vocab_projector": "mlm_head.decoder",
    },
    config={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "hidden_act": "activation",
    },
    defaults={"type_vocab_size": 0},
    pooler_activation=torch.relu,
)


def test_a_third_family_is_one_entry(tmp_path, monkeypatch):
    """DistilBERT: loaded, pruned, exported and loaded by transformers again."""
    monkeypatch.setitem(TABLE, "distilbert", DISTILBERT)
    sizes = {"vocab_size": len(VOCABULARY), "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40}
    config = transformers.DistilBertConfig(**sizes, initializer_range=0.3, num_labels=3, attn_implementation="eager")
    ids, mask, _ = inputs(transformers.BertConfig(vocab_size=len(VOCABULARY)), 3, 17)
    for kind in (transformers.DistilBertForMaskedLM, transformers.DistilBertForSequenceClassification):
        reference = kind(config).eval()
        reference.save_pretrained(tmp_path)
        (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
        model = Bert.load(tmp_path, mlm=kind is transformers.DistilBertForMaskedLM).eval()
        assert model.initialized == model.unused == [] and Tokenizer(tmp_path).family == "bert"
        with torch.no_grad():
            expected = reference(ids, mask.long()).logits
            if model.mlm_head:
                found, expected = model.mlm_logits(model(ids, mask)[mask]), expected[mask]
            else:
                found = model.class_logits(ids, mask)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    model.save(tmp_path / "export", ("a", "b", "c"), {})
    back, report = kind.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(back.eval()(ids, mask.long()).logits, expected, atol=1e-5, rtol=1e-5)
    masks = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool(), torch.rand(2, 40) > 0.5
    pruned = model.pruned(*masks).eval()
    pruned.save(tmp_path / "pruned", ("a", "b", "c"), {})
    found = Bert.load(tmp_path / "pruned").eval().class_logits(ids, mask)
    gates = tuple(mask.float() for mask in masks)
    torch.testing.assert_close(found, model.class_logits(ids, mask, gates=gates), atol=1e-5, rtol=1e-5)
