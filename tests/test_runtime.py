"""runtime/: dropout and products on a CPU, locks, the learning rate, the errors of every script."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import draw
import finetune
import search
from checkpoints import safetensors as our_safetensors
from runtime import cli, distributed, optim
from runtime.cli import BadInput
from runtime.cpu import Dropout, linear
from runtime.device import describe_machine
from runtime.start import INTERRUPTED
from tests.conftest import HERE, call, quick_search, spawn

UNIX_ONLY = f"""import mmap, os, sys, torch  # the library knows where it is
sys.modules |= dict.fromkeys(("resource", "pwd", "grp", "termios", "pty", "syslog"))
for name in "fork getuid geteuid getgid uname sysconf statvfs killpg setsid getloadavg sched_getaffinity".split():
    vars(os).pop(name, None)
vars(mmap).pop("MADV_DONTNEED", None)
del sys.argv[0]
sys.path.insert(0, {str(HERE)!r})
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""  # what Windows lacks. fcntl stays: filelock needs it here


X86 = "processor\t: 0\nmodel\t\t: 143\nmodel name\t: A CPU @ 2GHz: fast\nflags\t\t: fpu\n\nmodel name\t: Another\n"


@pytest.mark.parametrize(
    "info, name",
    [(X86, "A CPU @ 2GHz: fast, model 143"), ("CPU part\t: 0xd40\n", "CPU part 0xd40"), (None, "M4"), ("", "")],
)
def test_records_of_speed_name_the_processor(info, name, monkeypatch):
    def read_text(path, encoding):
        if info is None:  # macOS
            raise FileNotFoundError
        return info

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout="M4\n"))
    expected = rf"CPU with \d+ threads? \({re.escape(name)}\)"
    assert re.fullmatch(expected, describe_machine(torch.device("cpu")))


@pytest.mark.parametrize("script", ["draw", "finetune", "attack"])
def test_scripts_start_without_what_only_unix_has(script):
    ended = subprocess.run(
        [sys.executable, "-c", UNIX_ONLY, f"{script}.py", "--help"], cwd=HERE, capture_output=True, text=True
    )
    assert ended.returncode == 0 and ended.stdout.startswith("usage:"), ended.stderr


def test_a_search_needs_nothing_that_only_unix_has(tiny, corpus, tmp_path):
    command = [sys.executable, "-c", UNIX_ONLY, *quick_search(tiny, corpus, tmp_path, "--mini-epoch", 1)]
    ended = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert ended.returncode == 0 and "next: python draw.py" in ended.stdout, ended.stderr


def ended_script(tmp_path, body, prefix="", **environment):
    """(exit code, standard output, standard error) of a script of these lines, started by the shell."""
    path = tmp_path / "some.py"
    lines = ["import sys", f"sys.path.insert(0, {str(HERE)!r})", "import runtime.start", "from runtime import cli"]
    lines += ["def main():", *(f"    {line}" for line in ["pass", *body]), "cli.run(main)"]
    path.write_text("\n".join(lines), "utf8")
    shell = ["bash", "-c", f"{sys.executable} {path} {prefix}"]
    ended = subprocess.run(shell, env=os.environ | environment, capture_output=True, text=True)
    return ended.returncode, ended.stdout, ended.stderr


BORDER = {  # what main() does -> (exit code, part of the line)
    "a bug": ("[][0]", 1, "internal error: IndexError list index out of range; set ORTICKET_DEBUG=1"),
    "no memory, Python": ("bytes(2**62)", 1, "not enough memory: lower --batch-size"),
    "no memory, PyTorch": ("import torch; torch.empty(2**58)", 1, "not enough memory: lower --batch-size"),
    "no memory, CUDA": (
        "raise RuntimeError('CUDA out of memory. Tried')",
        1,
        "--grad-accum-steps, add --checkpointing",
    ),
    "no home": (
        "import pathlib; pathlib.Path('~nobody7').expanduser()",
        2,
        "no home directory for the caches: set HOME",
    ),
    "no UTF-8": ("chr(0xDCFF).encode()", 2, "not valid UTF-8"),
    "a package": ("import not_there", 2, "the package not_there is not installed: pip install -r requirements.txt"),
    "a file": ("open('/not/there')", 2, "error: /not/there: No such file or directory"),
    "Ctrl-C": ("raise KeyboardInterrupt", 130, "interrupted; run the same command again to resume"),
}


@pytest.mark.parametrize("case", BORDER)
def test_every_error_ends_in_one_line(case, capsys, monkeypatch):
    body, expected, line = BORDER[case]
    script = types.SimpleNamespace(__name__="some", main=lambda: exec(body))
    assert call(script) == expected
    error = capsys.readouterr().err.lstrip("\n")
    assert error.startswith("some.py: ") and line in error and error.count("\n") == 1
    monkeypatch.setenv("ORTICKET_DEBUG", "1")
    assert call(script) == expected
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and line in error.splitlines()[-1]


def test_output_that_is_closed_or_cannot_show_a_character(tmp_path):
    endless = ["while True:", "    print('line')"]
    assert ended_script(tmp_path, endless, "| head -n 1") == (0, "line\n", "some.py: standard output was closed\n")
    assert ended_script(tmp_path, ["print('line')"], ">&-") == (0, "", "")
    code, out, err = ended_script(tmp_path, ["print('é')", "raise cli.BadInput('é')"], PYTHONIOENCODING="ascii")
    assert (code, out, err) == (2, "\\xe9\n", "some.py: error: \\xe9\n")


def test_variables_of_torchrun_that_make_no_sense(tmp_path):
    join = ["import torch", "from runtime import distributed", "distributed.init_distributed(torch.device('cpu'))"]
    code, _, err = ended_script(tmp_path, [], WORLD_SIZE="2", RANK="first")
    assert code == 2 and err.count("\n") == 1 and "RANK is 'first', not a number: unset it" in err
    code, _, err = ended_script(tmp_path, join, WORLD_SIZE="2", RANK="0")
    assert code == 2 and err.count("\n") == 1 and "WORLD_SIZE is 2 without MASTER_ADDR, MASTER_PORT" in err
    show = ["from runtime.start import RANK", "print(RANK)"]
    assert ended_script(tmp_path, show, RANK="3") == (0, "0\n", "")  # other programs set RANK, too


SCRIPTS = ["search.py", "draw.py", "finetune.py", "attack.py", "-m baselines.robustt", "-m experiments.table1"]


@pytest.mark.parametrize("script", [*SCRIPTS, "-m benchmarks.bench", "-m benchmarks.gpu_check"])
def test_interrupting_the_imports_ends_in_one_line(script, tmp_path):
    """A module torch that is imported for a minute is in the place of the library."""
    (tmp_path / "torch.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)")
    process = spawn(script.split(), env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and err.count("\n") == 1 and err.endswith(f": {INTERRUPTED}\n"), err


def loop(monkeypatch, capsys, seconds, steps, **settings):
    """The lines of a loop whose steps take `seconds`, and the times at which they were printed."""
    now, times = [0.0], [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    bar, lines = cli.progress(steps, description="loop", **settings), []
    for step in range(steps):
        now[0] += seconds
        bar.update()
        bar.set_postfix_str(lambda: f"loss {step}", refresh=False)
        if found := capsys.readouterr().err:
            lines += found.splitlines()
            times.append(now[0])
    bar.close()
    assert all(re.match(r"\d\d:\d\d:\d\d loop: ", line) for line in lines)
    return [line[9:] for line in lines], np.diff([*times, now[0]])


@pytest.mark.parametrize("seconds, steps", [(0.5, 2000), (15, 270), (70, 30)])
def test_a_long_loop_without_a_terminal_estimates_its_time_and_prints_every_two_minutes(
    monkeypatch, capsys, seconds, steps
):
    lines, gaps = loop(monkeypatch, capsys, seconds, steps, parts=20, faster="a GPU")
    estimate, *lines = lines
    minutes = (steps - int(re.match(r"loop: ([\d,]+) steps to go, ", estimate)[1].replace(",", ""))) * seconds / 60
    assert f"{seconds:.3g} s each" in lines[-1]
    assert estimate.endswith(" at most; faster: a GPU") and 0 <= minutes < 4
    assert gaps.max() <= max(140, 1.5 * seconds) and len(lines) >= 18
    assert not [line for line in lines if "to go" in line] and lines[0].count("loss ") == 1


def test_a_short_loop_without_a_terminal_prints_nothing(monkeypatch, capsys):
    assert loop(monkeypatch, capsys, 0.04, 100)[0] == []
    lines, _ = loop(monkeypatch, capsys, 0.2, 100)  # 20 s: a line at every tenth, no estimate
    assert [line.split(",")[0] for line in lines][-1] == "loop: 90 of 100 steps" and len(lines) == 8


def test_a_loop_longer_than_announced_goes_on(monkeypatch, capsys):
    """Processes that share batches count some rows twice, and a server may send more than it declared."""
    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    bar = cli.progress(5, description="loop")
    for _ in range(3):
        now[0] += 10
        bar.update(4)
    assert "loop: 8 of 5 steps, 2.5 s each, 0 s left" in capsys.readouterr().err


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
    "no coefficients": (
        draw,
        ["--output", "{tmp}/new", "--model", "bert-base-uncased"],
        "coefficients.safetensors: run python search.py --model bert-base-uncased",
    ),
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
    "metadata of other types": (draw, ["--coefficients", "{tmp}/types.safetensors"], "does not say how it was made"),
    "a truncated file": (
        draw,
        ["--model", "tiny", "--coefficients", "{tmp}/cut.safetensors"],
        "not a valid safetensors file",
    ),
    "diverged": (draw, ["--coefficients", "{tmp}/nan.safetensors"], "no finite torch.float32 tensor"),
    "neurons of another model": (draw, ["--coefficients", "{tmp}/wide.safetensors"], "tensor of shape (2, 40)"),
    "a ratio with a zero below": (draw, ["--tau-head", "1/0"], "--tau-head: '1/0' is not a number"),
    "a gigantic seed": (finetune, ["--seed", "1" + "0" * 30], "must be below"),
    "three texts": (finetune, ["--task", "mine.csv", "--text-columns", *"abc"], "--text-columns a b c: give"),
    "columns of a task that has its own": (finetune, ["--text-columns", "a"], "rt has fixed columns"),
    "a revision of a bundled model": (search, ["--model", "minilm", "--revision", "v1"], "--revision v1 applies"),
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
        "settings": {"model": "tiny", "seed": 0},
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
    other_types = metadata | {"config": metadata["config"] | {"hidden_size": "24"}}
    our_safetensors.write_safetensors(tmp_path / "types.safetensors", c, other_types)
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
