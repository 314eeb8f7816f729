"""runtime/: dropout and products on a CPU, locks, the learning rate, the errors of every script."""

import math
import subprocess
import sys
import threading
import time

import pytest
import torch

import draw
import finetune
import search
from checkpoints import safetensors as our_safetensors
from runtime import distributed, optim
from runtime.cli import BadInput
from runtime.cpu import Dropout, linear
from tests.conftest import HERE, call, quick_search


@pytest.mark.parametrize("script", ["search", "draw", "finetune", "attack"])
def test_scripts_start_without_modules_that_only_unix_has(script):
    hidden = ("resource", "fcntl", "pwd", "grp", "termios")
    code = f"import sys, runpy; sys.modules |= dict.fromkeys({hidden!r}); sys.argv = ['{script}.py', '--help'];"
    code += f"runpy.run_module({script!r}, run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.startswith("usage:"), ended.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_unbiased_and_drops_its_share(dtype):
    x, dropout = torch.ones(1001, 999, dtype=dtype), Dropout(0.1).train()
    y = dropout(x)
    assert abs((y == 0).float().mean().item() - 0.1) < 0.002
    assert abs(y.float().mean().item() - 1) < 0.003
    assert len(y.unique()) == 2 and abs(((y == 0)[:, 0]).float().mean().item() - 0.1) < 0.04
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    "rows, width, neurons", [((7, 5), 24, 33), ((1,), 3, 1), ((0, 5), 3, 4), ((6,), 0, 4), ((6,), 3, 0)]
)
def test_a_product_is_the_same_with_and_without_gradients_for_all_sizes(rows, width, neurons, has_bias):
    x, weight, bias = torch.randn(*rows, width), torch.randn(neurons, width), torch.randn(neurons) if has_bias else None
    expected = x.double().numpy() @ weight.double().numpy().T + (bias.double().numpy() if has_bias else 0)
    expected = torch.from_numpy(expected).float()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(linear(x, weight, bias), expected, atol=1e-5, rtol=1e-5)
            with torch.autocast("cpu", torch.bfloat16):
                assert linear(x, weight, bias).dtype == torch.bfloat16
    assert torch.autograd.functional.jacobian(lambda x: linear(x, weight, bias).sum(), x).shape == x.shape


def test_of_two_commands_that_write_the_same_file_the_second_waits(tmp_path, capsys):
    seen, path = [], tmp_path / "some.state"

    with pytest.raises(BadInput), distributed.file_lock(path):
        raise BadInput("refused")
    assert not list(tmp_path.iterdir())

    def work(name):
        with distributed.file_lock(path):
            seen.append(f"{name} begins")
            time.sleep(0.3)
            seen.append(f"{name} ends")

    threads = [threading.Thread(target=work, args=name) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted([seen[:2], seen[2:]]) == [["a begins", "a ends"], ["b begins", "b ends"]]
    assert capsys.readouterr().err == f"another command is writing {path}: waiting until it ends\n"
    assert not list(tmp_path.iterdir())


def test_the_learning_rate_rises_and_falls_linearly():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rates = []
    for step in range(10):
        optim.set_learning_rate(optimizer, 2.0, step, 10, warmup=0.2)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25])


BAD = {
    "unknown model": (search, ["--model", "a/b/c"], "unknown model 'a/b/c': give minilm, a name on the hub"),
    "a model elsewhere": (search, ["--model", "a/b"], "model 'a/b': config.json of a/b is not in the cache"),
    "unknown corpus": (search, ["--corpus", "nowhere.txt"], "unknown corpus 'nowhere.txt'"),
    "ratio of 1": (search, ["--tau-ffn", "1"], "--tau-ffn: 1 must be below 1"),
    "negative ratio": (draw, ["--tau-head", "-0.1"], "--tau-head: -0.1 must be at least 0"),
    "not a number": (search, ["--gamma", "nan"], "--gamma: 'nan' is not a number"),
    "infinite": (search, ["--learning-rate", "inf"], "--learning-rate: 'inf' is not a number"),
    "no integer": (search, ["--adv-steps", "2.5"], "--adv-steps: '2.5' is not an integer"),
    "no ascent step": (search, ["--adv-steps", "0"], "--adv-steps: 0 must be at least 1"),
    "unknown flag": (search, ["--tau", "0.1"], "unrecognized arguments: --tau 0.1"),
    "unknown precision": (finetune, ["--precision", "fp8"], "invalid choice: 'fp8'"),
    "unknown task": (finetune, ["--task", "mnli"], "unknown task 'mnli'"),
    "task without ratio": (draw, ["--task", "mine"], "unknown task 'mine'"),
    "no coefficients": (draw, ["--output", "{tmp}/new"], "coefficients.safetensors: run python search.py"),
    "no ticket": (finetune, ["--output", "{tmp}/new"], "ticket.safetensors: run python draw.py --task rt"),
    "a folder that is a file": (search, ["--output", "{tmp}/file"], "cannot write"),
    "too many heads": (draw, ["--tau-head", "0.99", "--output", "{tmp}", "--model", "tiny"], "choose at most 2/3"),
    "another model's coefficients": (
        draw,
        ["--output", "{tmp}", "--model", "other"],
        "of model tiny: add --model tiny",
    ),
    "no coefficients at all": (draw, ["--coefficients", "{tmp}/ticket.safetensors"], "was not written by search.py"),
    "metadata of no script": (draw, ["--coefficients", "{tmp}/notes.safetensors"], "was not written by search.py"),
    "metadata without sizes": (draw, ["--coefficients", "{tmp}/sizes.safetensors"], "does not say how it was made"),
    "a truncated file": (
        draw,
        ["--model", "tiny", "--coefficients", "{tmp}/cut.safetensors"],
        "not a valid safetensors file",
    ),
    "diverged": (draw, ["--coefficients", "{tmp}/nan.safetensors"], "no finite torch.float32 tensor"),
    "neurons of another model": (draw, ["--coefficients", "{tmp}/wide.safetensors"], "tensor of shape (2, 40)"),
    "a ratio with a zero below": (draw, ["--tau-head", "1/0"], "--tau-head: '1/0' is not a number"),
    "a gigantic seed": (finetune, ["--seed", "1" + "0" * 30], "must be below"),
    "three texts": (finetune, ["--task", "mine.csv", "--text-columns", *"abc"], "--text-columns a b c: BERT reads"),
    "columns of a task that has its own": (finetune, ["--text-columns", "a"], "rt has fixed columns"),
    "a revision of a bundled model": (search, ["--model", "minilm", "--revision", "v1"], "--revision v1 applies to"),
    "columns of a corpus": (search, ["--label-column", "y"], "--label-column y needs a custom task as --objective"),
    "too long": (finetune, ["--max-length", "999", "--ticket", "none"], "--max-length 999: minilm reads at most 512"),
    "another model's ticket": (finetune, ["--ticket", "{tmp}/ticket.safetensors"], "drawn for another model"),
    "coefficients as ticket": (
        finetune,
        ["--ticket", "{tmp}/nan.safetensors"],
        "was not written by draw.py or robustt.py",
    ),
    "a model without weights": (finetune, ["--model", "{tmp}", "--ticket", "none"], "has several weights"),
    "an empty model folder": (finetune, ["--model", "{tmp}/empty", "--ticket", "none"], "empty has no weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    metadata = {
        "script": "search.py",
        "settings": {"model": "tiny"},
        "config": {"num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 24, "intermediate_size": 40},
        "model_sha256": "",
        "corpus_sha256": "",
        "versions": {},
    }
    c = {"head": torch.ones(2, 3), "ffn": torch.ones(2, 40)}
    for folder in ("tiny", "other"):
        our_safetensors.write_safetensors(tmp_path / folder / "coefficients.safetensors", c, metadata)
    ticket = {"script": "draw.py", "model_sha256": "f00", "settings": {}}
    our_safetensors.write_safetensors(tmp_path / "ticket.safetensors", c, ticket)
    our_safetensors.write_safetensors(
        tmp_path / "nan.safetensors", {name: t * math.nan for name, t in c.items()}, metadata
    )
    our_safetensors.write_safetensors(tmp_path / "notes.safetensors", c, metadata | {"settings": []})
    no_sizes = {key: value for key, value in metadata.items() if key != "config"}
    our_safetensors.write_safetensors(tmp_path / "sizes.safetensors", c, no_sizes)
    wide = c | {"ffn": torch.ones(2, 41)}
    our_safetensors.write_safetensors(tmp_path / "wide.safetensors", wide, metadata)
    whole = (tmp_path / "tiny" / "coefficients.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    script, arguments, message = BAD[case]
    assert call(script, *(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith(f"{script.__name__}.py: error: ")


def test_a_full_disk_ends_in_one_line_and_leaves_no_partial_file(tiny, corpus, tmp_path):
    """A limit on file sizes replaces the full disk: the write fails part way in the same manner."""
    script = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.argv.pop(0);"
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", script, *quick_search(tiny, corpus, tmp_path)]
    ended = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "cannot write" in ended.stderr and "File too large" in ended.stderr
    assert list((tmp_path / "tiny").iterdir()) == []
