"""bert.py beyond the specification: random configurations, MiniLM, padding, single positions, saving."""

import numpy as np
import pytest
import torch
import transformers

from bert import CLS_ONLY, Bert
from checkpoints import huggingface
from tests.conftest import FAMILIES, MINILM, inputs, saved, states_equal


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
