"""search.py beyond the specification: the MLM head, the adversary, learning rates, overwriting, divergence."""

import shutil
import unittest.mock

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

import data
import draw
import gates
import search
from bert import Bert, Config
from checkpoints import safetensors as our_safetensors
from inputs import mlm_head
from inputs.batches import Blocks, mask_tokens
from inputs.tokenizer import Tokenizer
from runtime import files
from tests.conftest import adversarial, call, interrupted_at, moved_against, one_step, quick_search, saved


def test_a_refused_search_leaves_the_mlm_head_of_another(tmp_path, corpus, capsys):
    saved(tmp_path / "headless", transformers.BertModel)
    command = quick_search(tmp_path / "headless", corpus, tmp_path, "--mlm-head-steps", 3)[1:]
    original = our_safetensors.write_safetensors
    interrupt = lambda *a: original(*a) or (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    assert call(search, *command) == 0
    head = (tmp_path / "headless" / "mlm_head.safetensors").read_bytes()
    (tmp_path / "headless" / "coefficients.safetensors").unlink()
    with unittest.mock.patch.object(our_safetensors, "write_safetensors", interrupt):
        assert call(search, *command) == 130
    assert call(search, *command, "--seed", "7") == 2 and "seed 0, not 7" in capsys.readouterr().err
    assert (tmp_path / "headless" / "mlm_head.safetensors").read_bytes() == head


def test_an_attack_fits_the_same_mlm_head_as_a_search(tmp_path, corpus, monkeypatch):
    saved(tmp_path / "headless", transformers.BertModel)
    assert call(search, *quick_search(tmp_path / "headless", corpus, tmp_path / "one", "--mlm-head-steps", 3)[1:]) == 0
    changed = {"block": 16, "batch_size": 4, "mlm_head_steps": 3, "precision": "fp32"}
    monkeypatch.setattr(mlm_head, "SETTINGS", mlm_head.SETTINGS | changed)
    find_corpus = data.find_corpus
    monkeypatch.setattr(data, "find_corpus", lambda name: find_corpus(str(corpus)))
    path, sha256 = data.find_model(str(tmp_path / "headless"))
    model, tokenizer = Bert.load(path, mlm=True), Tokenizer(path)
    torch.manual_seed(1)
    heads = [tmp_path / name / "headless" / "mlm_head.safetensors" for name in ("one", "two")]
    found = mlm_head.find_mlm_head(str(path), str(tmp_path / "two"), model, sha256, tokenizer, torch.device("cpu"))
    assert heads[0].read_bytes() == heads[1].read_bytes()
    assert our_safetensors.read_with_metadata(heads[0])[1] == found


@pytest.fixture
def few_articles(monkeypatch):
    """BBC News is 20 articles."""
    few = list(data.bbc())[::112]
    monkeypatch.setattr(data, "bbc", lambda: iter(few))
    monkeypatch.setitem(data.TASKS, "bbc", data.bundled_task("bbc", data.TOPICS, 256, data.bbc))


def begun(monkeypatch, *flags):
    """(exit code, MLM head and provenance with which a search of MiniLM would begin)."""
    found = []

    def stop(options, model, c, examples, run, dtype):
        found.append((model.mlm_head.state_dict(), run.checkpoint.provenance))
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "search", stop)
    return call(search, "--model", "minilm", *flags), *(found or [({}, {})])[0]


def test_a_search_of_minilm_takes_the_published_head_unless_another_is_asked_for(
    few_articles, tmp_path, monkeypatch, capsys
):
    fitted = []
    monkeypatch.setattr(mlm_head, "train_mlm_head", lambda *arguments: fitted.append(arguments[-1]))
    published = data.PUBLISHED / "minilm-mlm-head.safetensors"
    expected = safetensors.torch.load_file(published)
    for number, corpus in enumerate(([], ["--corpus", "bbc", "--seed", 1, "--block", 64])):
        code, head, made_by = begun(monkeypatch, "--output", tmp_path / str(number), *corpus)
        assert code == 130 and fitted == [] and made_by["mlm_head_sha256"] == files.sha256(published)
        assert head.keys() == expected.keys() and all(torch.equal(head[name], expected[name]) for name in head)
        printed = capsys.readouterr().out
        assert printed.count("MLM head of minilm: the published one, fitted on BBC News in 200 steps; search.py") == 1
    path = tmp_path / "words.txt"
    path.write_text("a few words " * 99)
    others = ["--mlm-head-steps", 200], ["--mlm-head-learning-rate", 3e-3], ["--corpus", path]
    for number, flags in enumerate(others):
        code, _, made_by = begun(monkeypatch, "--output", tmp_path / f"fitted{number}", *flags)
        assert code == 130 and len(fitted) == number + 1 and "mlm_head_sha256" not in made_by
        wanted = mlm_head.SETTINGS | {"batch_size": 32 if path in flags else search.SMALL_BATCH}
        wanted["precision"] = made_by["settings"]["precision"]
        assert fitted[-1] == wanted and {name: made_by["settings"][name] for name in wanted} == wanted


def test_a_published_head_that_is_damaged_or_of_another_model_is_refused(few_articles, tmp_path, monkeypatch, capsys):
    path = tmp_path / "minilm-mlm-head.safetensors"
    shutil.copy(data.PUBLISHED / path.name, path)
    monkeypatch.setattr(data, "PUBLISHED", tmp_path)
    tensors, metadata = our_safetensors.read_with_metadata(path)
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert begun(monkeypatch, "--output", tmp_path)[0] == 2
    assert f"{path} is damaged (wrong checksum)" in capsys.readouterr().err
    for change in ({"model_sha256": "0" * 64}, {"settings": metadata["settings"] | {"mlm_head_steps": 7}}):
        our_safetensors.write_safetensors(path, tensors, metadata | change)
        assert begun(monkeypatch, "--output", tmp_path)[0] == 2
        assert f"{path} was fitted to another model or with other settings" in capsys.readouterr().err


def test_the_published_head_predicts_masked_words_better_than_their_frequencies_do(few_articles):
    path, sha256 = data.find_model("minilm")
    model, tokenizer = Bert.load(path, mlm=True).eval(), Tokenizer(path)
    mlm_head.load_published("minilm", model, sha256)
    blocks = Blocks(tokenizer, *data.find_corpus("bbc"), 64)
    ids, positions, labels = mask_tokens(blocks.rows(torch.arange(24)), tokenizer)
    with torch.no_grad():
        loss = model.mlm_loss(model(ids, positions=positions), labels)
    shares = blocks.frequencies(tokenizer.size).add(0.5)
    assert loss < F.cross_entropy(shares.log().expand(len(labels), -1), labels) - 0.1


def test_an_attack_takes_the_head_of_its_search_or_else_the_published_one(tmp_path, monkeypatch):
    path, sha256 = data.find_model("minilm")
    model, tokenizer, device = Bert.load(path, mlm=True), Tokenizer(path), torch.device("cpu")
    published = data.PUBLISHED / "minilm-mlm-head.safetensors"
    tensors, metadata = our_safetensors.read_with_metadata(published)
    assert mlm_head.find_mlm_head("minilm", str(tmp_path), model, sha256, tokenizer, device) == metadata
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.mlm_head.state_dict().items())
    own = {name: tensor + 1 for name, tensor in tensors.items()}
    our_safetensors.write_safetensors(tmp_path / "minilm" / "mlm_head.safetensors", own, metadata | {"own": True})
    assert mlm_head.find_mlm_head("minilm", str(tmp_path), model, sha256, tokenizer, device)["own"]
    assert torch.equal(model.mlm_head.bias, own["bias"])


def test_the_default_batch_is_smaller_on_half_of_bbc_only():
    assert search.Options().corpus == "bbc-small" and search.Options().batch_size == search.SMALL_BATCH
    assert search.Options(batch_size=7).batch_size == 7
    others = {"corpus": "bbc"}, {"corpus": "wikitext-2-raw-v1"}, {"corpus": "mine.txt"}, {"objective": "rt"}
    assert [search.Options(**given).batch_size for given in others] == [32] * 4


@pytest.mark.parametrize("adversary", ["freelb", "pgd"])
def test_one_step_of_a_search_uses_the_adversary_of_its_options(corpus, tmp_path, adversary):
    """With ascent steps large enough to reverse gradients, c follows the K-step gradient; PGD's is that of the last."""
    saved(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    flags = ["--adversary", adversary, "--adv-steps", 3, "--adv-lr", 8, "--adv-init-mag", 2, "--adv-max-norm", 9]
    found, (ids, positions, labels) = one_step(tmp_path / "model", corpus, tmp_path, *flags)
    state = torch.get_rng_state()
    model, c = Bert.load(tmp_path / "model", mlm=True), gates.Coefficients(2, 3, 40)

    def loss_of(delta):
        return model.mlm_loss(model(ids, positions=positions, gates=c.gates, delta=delta), labels)

    torch.set_rng_state(state)
    only_last = adversary == "pgd"
    adversarial(loss_of, torch.ones_like(ids), steps=3, lr=8.0, init_mag=2.0, max_norm=9.0, only_last=only_last)
    moved_against(found, (c.head.grad + 1e-4, c.ffn.grad + 1e-4))
    gradient, c.ffn.grad = c.ffn.grad.clone(), None
    adversarial(loss_of, torch.ones_like(ids), steps=1, lr=0.0, init_mag=0.0, max_norm=0.0)
    assert (gradient.sign() != c.ffn.grad.sign()).any()


def test_options_that_are_not_given_have_the_numbers_of_the_preset_and_of_the_adversary(tmp_path, capsys):
    def numbers(**given):
        o = search.Options(**given)
        return o.adv_steps, o.adv_lr, o.adv_init_mag, o.adv_max_norm, o.lambda_head, o.lambda_ffn

    assert numbers() == (3, 0.03, 0.05, 0.0, 1e-4, 1e-4)
    assert numbers(preset="earlyrobust") == (5, 0.01, 0.05, 0.0, 1e-5, 2e-4)  # its run_first_stage.sh
    assert numbers(preset="earlyrobust", adv_steps=2, lambda_ffn=0.0) == (2, 0.01, 0.05, 0.0, 1e-5, 0.0)
    assert numbers(preset="earlyrobust", adversary="vanilla")[:3] == (1, 0.0, 0.0)
    assert numbers(adversary="freelb-zhu2020")[:4] == (3, 0.1, 1.0, 0.6)  # launch/FreeLB/sst-fp32-clip.sh
    assert (
        call(search, "--adversary", "infobert", "--model", tmp_path) == 2
        and "invalid choice: 'infobert'" in capsys.readouterr().err
    )


def test_under_autocast_changes_of_c_below_bfloat16s_spacing_reach_the_output():
    """c multiplies the weights in float32. The product's rounding to bfloat16 keeps the change on average, by a slope
    of 1 between the changes of the outputs; c rounded to bfloat16 would not change at all."""
    layer = Bert(Config(hidden_size=192, intermediate_size=768, initializer_range=0.1)).layers[0].eval()
    x, ones = torch.randn(16, 32, 192), [torch.ones(12), torch.ones(768)]

    @torch.no_grad()
    def change(enabled, gates):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return layer(x, gates=gates).float() - layer(x, gates=ones).float()

    for kind, c in enumerate(ones):  # heads, neurons
        moved = list(ones)
        moved[kind] = c + 1e-3 * torch.randn_like(c).sign()
        exact, found = change(False, moved), change(True, moved)
        assert abs((found * exact).sum() / (exact * exact).sum() - 1) < 0.1
        assert change(True, [each.bfloat16().float() for each in moved]).norm() == 0


def test_c_can_have_its_own_learning_rate(corpus, tmp_path):
    """One step moves c in the same direction, by another distance."""
    saved(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    alike, _ = one_step(tmp_path / "model", corpus, tmp_path / "alike")
    apart, _ = one_step(tmp_path / "model", corpus, tmp_path / "apart", "--learning-rate-c", 0.05)
    for name in ("head", "ffn"):
        torch.testing.assert_close(apart[name] - 1, 50 * (alike[name] - 1), atol=1e-4, rtol=0)
        assert (apart[name] - 1).abs().median() > 0.04


def test_a_diverged_search_is_an_error(tiny, corpus, tmp_path, capsys):
    command = quick_search(tiny, corpus, tmp_path, "--learning-rate", "1e30", "--clip-norm", "1e30")[1:]
    assert call(search, *command) == 2
    assert "the search diverged in mini-epoch 1" in capsys.readouterr().err
    assert not (tmp_path / "tiny" / "coefficients.safetensors").exists()


def test_overwriting_restarts_and_removes_the_old_result(tiny, corpus, tmp_path, capsys):
    """A is complete, B overwrites it and is interrupted: A is gone, and A's command does not remove the state of B."""
    command = quick_search(tiny, corpus, tmp_path, "--mini-epoch", "0.5")[1:]
    state, done = (tmp_path / "tiny" / name for name in ("search.state.safetensors", "coefficients.safetensors"))
    assert call(search, *command) == 0 and done.exists()
    assert call(search, *command, "--tau-head", "0.99", "--overwrite") == 2 and done.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates.EarlyStopping, "update", interrupted_at(2))
        assert call(search, *command, "--seed", "1", "--overwrite") == 130
    assert state.exists() and not done.exists()
    assert call(search, *command) == 2 and state.exists()
    state.write_bytes(b"")
    assert call(search, *command, "--seed", "1") == 2
    assert (
        "not a valid safetensors file: ValueError cannot mmap an empty file: use --overwrite or another --output"
        in capsys.readouterr().err
    )
    assert call(search, *command, "--seed", "1", "--overwrite") == 0 and done.exists() and not state.exists()


def test_a_search_with_other_settings_replaces_nothing(tiny, corpus, tmp_path, capsys):
    command = quick_search(tiny, corpus, tmp_path, "--mini-epoch", "1")[1:]
    assert call(search, *command) == 0
    path = tmp_path / "tiny" / "coefficients.safetensors"
    before = path.read_bytes()
    assert call(search, *command, "--seed", "1") == 2
    assert "seed 0, not 1): use --overwrite or another --output" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert call(search, *command, "--seed", "1", "--overwrite") == 0
    assert path.read_bytes() != before


def test_a_draw_that_only_the_position_decides_is_told(capsys):
    c = torch.ones(2, 3)
    draw.warn_of_ties(c, gates.draw_mask(c, 1 / 3), "heads")
    assert capsys.readouterr().out.startswith("4 of the kept heads have the same coefficient as a pruned one")
    c[0, :2] = 0.5
    draw.warn_of_ties(c, gates.draw_mask(c, 1 / 3), "heads")
    draw.warn_of_ties(c, gates.draw_mask(c, 0), "heads")
    assert capsys.readouterr().out == ""
