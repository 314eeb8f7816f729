"""Several processes, micro-batches and checkpointing compute what one process computes at once."""

import json
import types

import pytest
import torch

import finetune
import freelb
import gates
import search
from bert import Bert, Config
from checkpoints import safetensors as our_safetensors
from inputs.batches import Batch, MaskedBatch
from runtime import distributed
from runtime.cli import BadInput
from runtime.device import pick_device
from tests.conftest import HERE, call, gradients, inputs, interrupted_at, quick_search, saved, spawn


def torchrun(processes, *arguments):
    """(exit code, standard output, standard error) of `torchrun --nproc-per-node PROCESSES ARGUMENTS`."""
    process = spawn(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *arguments])
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory):
    """A random model without dropout, which differs between processes."""
    folder = tmp_path_factory.mktemp("models") / "model"
    saved(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    Bert.load(folder, mlm=True, num_labels=2).save(folder, ("early", "late"), {})  # a search ignores the classifier
    return folder


def test_devices_are_picked_by_name_and_process(monkeypatch):
    for name in ("gpu", "cuda:", "cuda:x", "cpu:0", "auto:1", "mps:0", ""):
        with pytest.raises(BadInput, match=f"--device {name!r}: give auto, cpu, cuda"):
            pick_device(name)
    for name in ("cuda", "cuda:0", "mps"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(BadInput, match=f"--device {name}: PyTorch .* finds no such device"):
            pick_device(name)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []  # the device of calls that name none
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == pick_device("cuda") == torch.device("cuda:1") and pick_device("cpu").type == "cpu"
    assert pick_device("cuda:0") == torch.device("cuda:0")  # all processes
    assert current == [1, 1, 0]
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # makes a plan for every shape
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BadInput, match="GPU 2 does not exist, this machine has 2 GPUs: .* at most --nproc-per-node 2"):
        pick_device()
    with pytest.raises(BadInput, match="GPU 2 does not exist, this machine has 2 GPUs: the first is cuda:0"):
        pick_device("cuda:2")


def test_what_mps_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    options = search.Options(device="mps", checkpointing=True)
    with pytest.raises(BadInput, match="--checkpointing is not for MPS"):
        distributed.start(options)
    monkeypatch.setattr(distributed, "WORLD", 2)
    with pytest.raises(BadInput, match="several processes need CUDA or the CPU"):
        distributed.start(search.Options(device="mps"))


@pytest.mark.parametrize("kind", ["masked words", "padded pairs", "texts"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_makes_no_tensor_on_the_cpu(monkeypatch, kind, checkpointing):
    """PyTorch's meta device has no numbers, but is another device than the CPU: to use both together is an error."""
    generator = types.SimpleNamespace(get_rng_state=lambda: None, set_rng_state=lambda state: None)
    monkeypatch.setattr(torch, "meta", generator, raising=False)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    with torch.device("meta"):
        model, c = Bert(Config(**sizes, num_labels=2), mlm=True), gates.Coefficients(2, 3, 40)
        ids = torch.zeros(4, 10, dtype=torch.long)
    model.checkpointing = checkpointing
    padded = Batch(ids, ids > 0, ids, ids[:, 0])
    batch = {
        "masked words": MaskedBatch(ids, ids[0], ids[0]),
        "padded pairs": padded,
        "texts": padded._replace(segments=None),
    }[kind]
    delta = freelb.initial_delta(batch.token_mask, 24, 0.05, 0.2)
    loss_of = lambda delta: search.objective(model, batch, c.gates, delta)  # noqa: E731
    loss = freelb.freelb(loss_of, delta, batch.token_mask, 3, 0.03, 0.2)
    c.penalty(1e-4, 1e-4).backward()
    norm = torch.nn.utils.clip_grad_norm_([*model.parameters(), *c.parameters()], 1.0)
    assert loss.is_meta and norm.is_meta
    with pytest.raises(RuntimeError, match="device"):  # PyTorch does notice
        freelb.freelb(loss_of, torch.zeros(4, 10, 24), batch.token_mask, 3, 0.03, 0.2)


def test_two_processes_resume_the_search_of_one_and_find_what_one_finds(without_dropout, corpus, tmp_path):
    """The processes compute 21 and 22 blocks of a batch of 43. The last batch has 1 block: one process has none."""
    command = {
        name: quick_search(without_dropout, corpus, tmp_path / name, "--batch-size", 43, "--gamma", 1e-9)
        for name in ("one", "two")
    }
    assert call(search, *command["one"][1:]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates.EarlyStopping, "update", interrupted_at(3))
        assert call(search, *command["two"][1:]) == 130
    code, out, err = torchrun(2, *command["two"])
    assert code == 0 and out.count("searched 9 of 9 mini-epochs") == 1 and "2 processes" in out, err
    found, expected = (
        our_safetensors.read_with_metadata(tmp_path / name / "model" / "coefficients.safetensors")[0]
        for name in ("two", "one")
    )
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5, equal_nan=True)
    assert (found["head"] - 1).abs().max() > 4e-3  # it did search
    assert {path.name for path in (tmp_path / "two" / "model").iterdir()} == {
        *("coefficients.safetensors", "search.json", "search.png"),
    }


@pytest.mark.parametrize("more", [["--checkpointing"], ["--grad-accum-steps", 2], ["--grad-accum-steps", 5]])
def test_saving_memory_does_not_change_a_search(without_dropout, corpus, tmp_path, more):
    command = quick_search(without_dropout, corpus, tmp_path / "plain", "--batch-size", 43, "--mini-epoch", 1)[1:]
    assert call(search, *command) == 0
    command[command.index("--output") + 1] = tmp_path / "saving"
    assert call(search, *command, *more) == 0
    found, expected = (
        our_safetensors.read_with_metadata(tmp_path / name / "model" / "coefficients.safetensors")[0]
        for name in ("saving", "plain")
    )
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5, equal_nan=True)


def test_checkpointing_repeats_the_dropout_masks(tiny):
    """With dropout, the gradients are equal to the bit."""
    model, found = Bert.load(tiny, num_labels=2).train(), []
    ids, mask, segments = inputs(model.config, 3, 10)
    for model.checkpointing in (False, True):
        torch.manual_seed(5)
        model.class_loss(ids, mask, segments, torch.tensor([0, 1, 1])).backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]) and len(found[0]) > 30


def few_epochs(model, task, output, *more):
    flags = f"--task {task} --model {model} --output {output} --ticket none --epochs 2 --batch-size 6 --precision fp32"
    return ["finetune.py", *flags.split(), *map(str, more)]


def test_two_processes_fine_tune_as_one(without_dropout, sentences, tmp_path):
    command = {
        name: few_epochs(without_dropout, sentences, tmp_path / name, "--method", "freelb") for name in ("one", "two")
    }
    assert call(finetune, *command["one"][1:]) == 0
    code, out, err = torchrun(2, *command["two"])
    assert code == 0 and out.count("best of 2 epochs") == 1, err
    same_models(*(next((tmp_path / name).rglob("model.safetensors")).parent for name in ("one", "two")))


def same_models(*folders):
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    assert one["validation_accuracy_by_epoch"] == other["validation_accuracy_by_epoch"]
    assert one["test_accuracy"] == other["test_accuracy"]
    one, other = (our_safetensors.read_with_metadata(folder / "model.safetensors")[0] for folder in folders)
    for name in one:
        if not name.endswith("key.bias"):  # softmax is invariant to it: Adam scales the rounding error of its gradient
            torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["pgd", "freelb"])
def test_gradient_accumulation_does_not_change_fine_tuning(without_dropout, sentences, tmp_path, method):
    folders = []
    for accumulate in (1, 4):
        command = few_epochs(without_dropout, sentences, tmp_path / str(accumulate), "--method", method)
        assert call(finetune, *command[1:], "--grad-accum-steps", accumulate) == 0
        folders.append(next((tmp_path / str(accumulate)).rglob("model.safetensors")).parent)
    same_models(*folders)


def test_infobert_trains_in_micro_batches(without_dropout, sentences, tmp_path):
    """Its regularizers compare the rows of a part only, so that the model differs from that of one batch."""
    command = few_epochs(without_dropout, sentences, tmp_path, "--method", "infobert", "--grad-accum-steps", 2)
    assert call(finetune, *command[1:]) == 0
    metrics = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    assert 0 < metrics["test_accuracy"] <= 1


def test_processes_that_all_fail_print_one_line(without_dropout, corpus, tmp_path):
    code, _, err = torchrun(2, *quick_search(without_dropout, corpus, tmp_path, "--tau-head", 0.99))
    assert code != 0 and err.count("search.py: error:") == 1


def test_the_process_that_fails_prints_why_and_the_others_end(tmp_path):
    (tmp_path / "some.py").write_text(
        f"""import sys, torch; sys.path.insert(0, {str(HERE)!r}); from runtime import cli, distributed
def main():
    distributed.init_distributed(torch.device("cpu"))
    if distributed.RANK:
        raise cli.BadInput("of the second process")
    distributed.all_reduce_sum(torch.ones(1))
cli.run(main)"""
    )
    code, _, err = torchrun(2, tmp_path / "some.py")
    assert code != 0 and err.count("some.py: error: of the second process") == 1, err
    assert "[rank0]" not in err, err  # torch's prefix of tracebacks
