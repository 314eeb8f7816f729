"""checkpoints/provenance.py and all that scripts write: edited code is noticed, damaged files are refused or made
again, one command at a time writes, and interrupted runs resume."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import types
import unittest.mock
import warnings
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
import transformers

import attack
import data
import draw
import finetune
import gates
import search
from attacks.results import Results
from baselines import robustt
from bert import Bert, Config
from checkpoints import cache, provenance, runs
from checkpoints import safetensors as our_safetensors
from checkpoints.provenance import (
    Checkpoint,
    is_up_to_date,
    note_other_code,
    read_made_by,
    read_result,
    software,
    without_paths,
)
from checkpoints.tickets import find_ticket, read_coefficients
from experiments import runs as runs_of_tables
from experiments import table2, tables
from inputs import batches, mlm_head
from inputs.batches import Blocks, TokenizedSplit
from inputs.finetuned import load_finetuned
from inputs.tokenizer import Tokenizer
from runtime import distributed
from runtime import files as runtime_files
from runtime.cli import BadInput
from tests.conftest import HERE, call, interrupted_at, saved, without_progress

SCRIPTS = {script.__name__: script for script in (search, draw, finetune, attack, robustt)}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A copy of the project's Python files, which the scripts take for theirs."""
    for path in [*HERE.glob("*.py"), *HERE.glob("[a-z]*/*.py")]:
        target = tmp_path / "source" / path.relative_to(HERE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "source")
    for module in (*SCRIPTS.values(), mlm_head, batches):
        monkeypatch.setattr(module, "__file__", str(tmp_path / "source" / Path(module.__file__).relative_to(HERE)))
    return tmp_path / "source"


def edit_text(path):
    """Change comments, docstrings and formatting of a Python file, as far as a regular expression finds them."""
    text = path.read_text("utf8").replace('"""', '"""Edited. ', 1) + "\n\n# a comment\n"
    path.write_text(re.sub(r"\n\n(def \w+\(.*\):)\n", r"\n\n\n# a comment\n\1  # another\n\n", text), "utf8")


def edit_function(path, name):
    """Insert a statement into a function of a Python file."""
    text = path.read_text("utf8")
    edited = re.sub(rf"(\n( *)def {name}\(.*\):.*\n)", r"\1\2    edited = True\n", text)
    assert edited != text
    path.write_text(edited, "utf8")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_code_of_a_script_is_what_it_imports(script):
    """As the statements in its files say it, also those inside functions."""
    path = Path(SCRIPTS[script].__file__)
    found = software(path)["code"].keys()
    assert {path.relative_to(HERE).as_posix(), "data.py", "runtime/cli.py", "runtime/__init__.py"} <= found
    for name in found:
        statements = re.findall(r"^ *(?:from ([\w.]+) )?import ([\w, ]+)", (HERE / name).read_text("utf8"), re.M)
        names = {f"{package}.{part}".strip(".") for package, parts in statements for part in parts.split(", ")}
        files = {file for of in names for file in (f"{of.replace('.', '/')}.py", f"{of.rpartition('.')[0]}.py")}
        assert {file for file in files if (HERE / file).is_file()} <= found
    others = {f"{name.replace('.', '/')}.py" for name in SCRIPTS} - {path.relative_to(HERE).as_posix()}
    assert not others & found


def test_code_is_found_however_it_is_imported(source):
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "__init__.py").write_text("x = 1")
    (source / "deep" / "er" / "__init__.py").write_text("from .. import other\nfrom ..other import y")
    (source / "deep" / "er" / "one.py").write_text("from .two import z\nimport json, deep.er.three")
    for name in ("deep/other", "deep/er/two", "deep/er/three", "deep/unused", "json"):
        (source / f"{name}.py").write_text("y = z = 0")
    (source / "some.py").write_text("def f():\n    import deep.er.one as one\n")
    names = ["some", "deep/__init__", "deep/other", "json"]
    names += [f"deep/er/{name}" for name in ("__init__", "one", "two", "three")]
    assert software(source / "some.py")["code"].keys() == {f"{name}.py" for name in names}


def test_the_code_of_several_scripts_is_that_of_each():
    names = "search", "draw", "finetune", "attack", "baselines/robustt", "experiments/runs"
    of_each = [software(HERE / f"{name}.py")["code"] for name in names]
    assert runs_of_tables.code() == {name: digest for code in of_each for name, digest in code.items()}


def test_settings_for_others_name_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "uncased").mkdir()
    (tmp_path / "uncased" / "bert_model.ckpt.index").touch()
    settings = {"model": "uncased/bert_model.ckpt", "task": "/a/mine.csv", "corpus": "."}
    assert without_paths(settings) == {"model": "uncased", "task": "mine.csv", "corpus": tmp_path.name}
    settings = {"model": "owner/name", "task": "sst2", "objective": "mlm"}
    assert without_paths(settings) == settings


def test_the_digest_of_code_ignores_comments_docstrings_and_formatting(source):
    before = software(source / "search.py")["code"]
    for name in before:
        edit_text(source / name)
    for name in ("csv", "data", "torch"):  # folders of a user, with files that are no code
        (source / name).mkdir()
    assert software(source / "search.py")["code"] == before
    edit_function(source / "gates.py", "update")
    assert {name for name, digest in software(source / "search.py")["code"].items() if digest != before[name]} == {
        "gates.py"
    }


@pytest.fixture(scope="session")
def made(tmp_path_factory, corpus):
    """A folder with everything that the scripts write for a tiny model, and the commands that wrote it."""
    folder = tmp_path_factory.mktemp("made")
    saved(folder / "tiny", transformers.BertModel)
    generator = np.random.Generator(np.random.PCG64(1))
    words = ["".join(generator.choice(list("abcdefgh"), 2)) for _ in range(20)]
    lines = [f"{' '.join(generator.choice(words, 5))},{'yes' if i % 2 else 'no'}" for i in range(60)]
    (folder / "mine.csv").write_text("text,label\n" + "\n".join(lines))
    where = ["--model", folder / "tiny", "--output", folder / "runs"]
    task = ["--task", folder / "mine.csv"]
    brief = ["--epochs", 1, "--batch-size", 30]
    commands = {
        "search": ["--corpus", corpus, *where, "--block", 16, "--batch-size", 32, "--mini-epoch", 0.5],
        "draw": [*where, *task],
        "finetune": [*where, *task, *brief, "--ticket", "none"],
        "baselines.robustt": [*where, *task, *brief, "--adv-steps", 1],
        "attack": [*where, *task, "--ticket", "none", "--attack", "deepwordbug", "--n", 3],
    }
    commands["search"] += ["--mlm-head-steps", 2]
    for name, command in commands.items():
        assert call(SCRIPTS[name], *command) == 0
    return types.SimpleNamespace(folder=folder, commands=commands)


@pytest.fixture
def again(made, tmp_path, source, monkeypatch):
    """A function that runs a command of `made` in a copy of its results."""
    shutil.copytree(made.folder / "runs", tmp_path / "runs")

    def run(name, *more):
        command = [tmp_path / "runs" if part == made.folder / "runs" else part for part in made.commands[name]]
        return call(SCRIPTS[name], *map(str, command), *more)

    return run


EDITS = {  # script -> (a file that it imports, a function in it, its result)
    "search": ("search.py", "search", "coefficients.safetensors"),
    "draw": ("gates.py", "draw_mask", "mine/ticket.safetensors"),
    "finetune": ("freelb.py", "freelb", "mine/none-vanilla-seed0/model.safetensors"),
    "baselines.robustt": ("baselines/robustt.py", "draw", "mine/robustt-seed0.safetensors"),
    "attack": ("attacks/recipes.py", "build", "mine/none-vanilla-seed0/deepwordbug.json"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_script_notices_an_edited_function_and_no_edited_comment(again, source, tmp_path, capsys, name):
    file, function, result = EDITS[name]
    path = tmp_path / "runs" / "tiny" / result
    before = path.read_bytes()
    edit_text(source / file)
    assert again(name) == 0 and path.read_bytes() == before
    assert re.search(
        rf"reusing {path}, made by the same command, \d{{4}}-\d\d-\d\d \d\d:\d\d\n", capsys.readouterr().out
    )
    edit_function(source / file, function)
    assert again(name) == 2 and path.read_bytes() == before
    assert f"{path} was made by other code ({file}): use --overwrite or another --output\n" in capsys.readouterr().err
    assert again(name, "--overwrite") == 0
    assert "reusing" not in capsys.readouterr().out and path.read_bytes() != before
    assert again(name) == 0 and f"reusing {path}" in capsys.readouterr().out
    assert again(name, "--overwrite") == 0 and "reusing" not in capsys.readouterr().out


def test_a_table_notices_an_edited_function_and_no_edited_comment(source, tmp_path, monkeypatch, capsys):
    made, flags = [], ["--methods", "PGD", "--model", "minilm", "--tasks", "bbc", "--results", tmp_path]
    monkeypatch.setattr(runs_of_tables, "ROOT", source)
    monkeypatch.setattr(runs_of_tables, "__file__", str(source / "experiments" / "runs.py"))
    monkeypatch.setattr(tables, "run_method", lambda *_: made.append(1) or {"figures": {}, "resources": {}})
    for number, edit in enumerate((None, edit_text)):
        for path in source.rglob("*.py") if edit else ():
            edit(path)
        assert call(table2, *flags) == 0 and len(made) == 1, number
    edit_function(source / "baselines" / "infobert.py", "losses")
    edit_function(source / "attacks" / "recipes.py", "build")
    before = (tmp_path / "table2.json").read_bytes()
    assert call(table2, *flags) == 2 and len(made) == 1 and (tmp_path / "table2.json").read_bytes() == before
    assert (
        "attacks/recipes.py, baselines/infobert.py): use --overwrite, or another --results" in capsys.readouterr().err
    )
    for _ in range(2):  # the second has the code of the first
        assert call(table2, *flags, "--overwrite", "--seeds", 2) == 0 and len(made) == 3
    assert [run["seed"] for run in tables.load_runs(tmp_path / "table2.json")] == [0, 1]


def test_a_script_of_a_table_is_overwritten_only_if_it_cannot_be_reused(monkeypatch):
    ran, codes = [], iter([0, 2, 0, 2, 2, 3])

    def run(command, **_):
        ran.append(command[2:])
        return types.SimpleNamespace(returncode=next(codes))

    monkeypatch.setattr(runs_of_tables.subprocess, "run", run)
    for _ in range(2):
        runs_of_tables.run_script("draw", task="rt", overwrite=True)
    assert ran == [["--task", "rt"]] * 2 + [["--task", "rt", "--overwrite"]]
    with pytest.raises(BadInput, match="failed with exit code 2"):
        runs_of_tables.run_script("draw", task="rt", overwrite=True)
    with pytest.raises(BadInput, match="failed with exit code 3"):
        runs_of_tables.run_script("draw", task="rt", overwrite=True)


def test_an_attacks_code_is_none_of_a_searchs(again, source, capsys):
    edit_function(source / "attack.py", "sample")
    edit_function(source / "finetune.py", "report")
    assert again("search") == 0 and "reusing" in capsys.readouterr().out


def test_a_run_killed_before_an_edit_does_not_go_on_with_other_code(again, source, tmp_path, capsys):
    result = tmp_path / "runs" / "tiny" / "coefficients.safetensors"
    state, before = result.with_name("search.state.safetensors"), result.read_bytes()
    result.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates.EarlyStopping, "update", interrupted_at(2))
        assert again("search") == 130 and state.exists()
    edit_text(source / "bert.py")
    unedited = (source / "bert.py").read_bytes()
    edit_function(source / "bert.py", "class_loss")
    assert again("search") == 2
    assert f"{state} was made by other code (bert.py): use --overwrite" in capsys.readouterr().err
    (source / "bert.py").write_bytes(unedited)
    assert again("search") == 0 and result.read_bytes() == before
    assert f"resuming {state}" in capsys.readouterr().out


def test_overwriting_begins_anew_and_is_resumed_by_the_same_command(again, tmp_path, capsys):
    """An unfinished run without --overwrite is not continued by one with it."""
    result = tmp_path / "runs" / "tiny" / "coefficients.safetensors"
    state, before = result.with_name("search.state.safetensors"), result.read_bytes()
    for more in ([], ["--overwrite"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gates.EarlyStopping, "update", interrupted_at(2))
            result.unlink(missing_ok=True)
            assert again("search", *more) == 130
        assert "resuming" not in capsys.readouterr().out
    assert again("search", "--overwrite") == 0 and result.read_bytes() == before
    assert f"resuming {state}" in capsys.readouterr().out and not state.exists()


class Files:
    """Copies of what the scripts write, and how each is read. `NAME` returns (path, function that reads it)."""

    def __init__(self, made, folder, monkeypatch):
        self.tiny, self.folder = made.folder / "tiny", folder
        shutil.copytree(made.folder / "runs" / "tiny", folder / "runs")
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        self.config, self.sha256 = Config.read(self.tiny), data.find_model(str(self.tiny))[1]
        self.tokenizer, self.task = Tokenizer(self.tiny), data.find_task(str(made.folder / "mine.csv"))
        self.splits, self.run = self.task.load(None), folder / "runs" / "mine" / "none-vanilla-seed0"

    def result(self, name, read):
        """A result: what its own script finds there, then what the next script reads."""
        path = self.folder / "runs" / name
        made_by = our_safetensors.read_with_metadata(path)[1]
        return path, lambda: (is_up_to_date(path, made_by, False), read(path))

    def coefficients(self):
        return self.result("coefficients.safetensors", read_coefficients)

    def ticket(self, name="mine/ticket.safetensors"):
        def read(path):
            return find_ticket(finetune.Options(ticket=str(path), task="mine.csv"), path, self.sha256, self.config)[0]

        return self.result(name, read)

    def robustt_ticket(self):
        return self.ticket("mine/robustt-seed0.safetensors")

    def mlm_head(self):
        path = self.folder / "runs" / "mlm_head.safetensors"
        head, made_by = Bert.load(self.tiny, mlm=True).mlm_head, our_safetensors.read_with_metadata(path)[1]

        def read():
            provenance.load_module(head, read_made_by(path, made_by)[0], path)
            return head.state_dict()

        return path, read

    def state(self):
        path, c, settings = self.folder / "search.state.safetensors", gates.Coefficients(2, 3, 40), {"seed": 0}
        made_by = {"script": "search.py", "settings": settings, **software(search.__file__)}
        optimizer = torch.optim.AdamW(c.parameters())
        c.penalty(1, 1).backward()
        optimizer.step()
        Checkpoint(path, made_by, False).save(optimizer, {"c": c}, {"trace.loss": torch.ones(3)})

        def read():
            checkpoint, other = Checkpoint(path, made_by, False), gates.Coefficients(2, 3, 40)
            optimizer = torch.optim.AdamW(other.parameters())
            return checkpoint.load(optimizer, c=other), other.state_dict(), optimizer.state_dict()["state"]

        return path, read

    def model(self, name="model.safetensors"):
        options = finetune.Options(task="mine.csv")

        def read():
            model, tokenizer, length, found = load_finetuned(self.run, self.task, self.splits, options, "cpu")
            runs.read_metrics(self.run)  # as attack.py does
            return model.state_dict(), model.config, tokenizer.digest, length, found

        return self.run / name, read

    def config_json(self):
        return self.model("config.json")

    def tokenizer_json(self):
        return self.model("tokenizer.json")

    def metrics(self):
        return self.run / "metrics.json", lambda: runs.read_metrics(self.run)

    def attack_summary(self):
        path = self.run / "deepwordbug.json"
        made_by = read_result(path)
        return path, lambda: read_made_by(path, made_by)[1]

    def attack_lines(self):
        path, found = self.run / "deepwordbug.jsonl", read_result(self.run / "deepwordbug.json")
        kept = ("script", "settings", "model_sha256", "task_sha256", "code", "versions")
        arguments = {key: found[key] for key in kept}, "deepwordbug", found["resources"], [0, 1, 2], False
        return path, lambda: list(Results(path, *arguments).rows.values())

    def tokens(self):
        read = lambda: Blocks(self.tokenizer, ["abc", "bcd efg"] * 9, 90, "key", 8).rows(torch.arange(4))  # noqa: E731
        read()
        return next((self.folder / "orticket" / "tokens").glob("*.int32")), read

    def encoding(self):
        def read():
            split = TokenizedSplit(self.tokenizer, self.splits["train"], 12, "cpu")
            return split.ids, split.ends, split.second_start, split.num_truncated

        read()
        return next((self.folder / "orticket" / "encodings").glob("*.safetensors")), read

    def table(self):
        path = self.folder / "table1.json"
        tables.save_run(path, {"task": "rt", "method": "PGD", "seed": 0, "settings": {"n": 5}, "figures": {"a": 0.1}})
        return path, lambda: tables.load_runs(path)


KINDS = [name for name in vars(Files) if name not in ("__init__", "result") and not name.startswith("__")]


def frozen(value):
    """Any value of nested tensors, as text that is equal for equal values only."""
    if isinstance(value, dict):
        return {str(key): frozen(item) for key, item in sorted(value.items(), key=str)}
    if isinstance(value, (list, tuple)):
        return [frozen(item) for item in value]
    return [str(value.dtype), list(value.shape), value.numpy().tobytes()] if isinstance(value, torch.Tensor) else value


def of_another_run(path, folder):
    """A file of the same kind that another run wrote."""
    other = folder / "other"
    if path.suffix == ".safetensors":
        tensors, found = our_safetensors.read_with_metadata(path)
        found["settings"] = found.get("settings", {}) | {"seed": 7}
        found |= {"key": "0"} if "key" in found else {}
        changed = {name: ~tensor if tensor.dtype == torch.bool else tensor + 1 for name, tensor in tensors.items()}
        our_safetensors.write_safetensors(other, changed, found)
    elif path.suffix == ".json" and "checksum" in json.loads(path.read_text("utf8")):
        found = read_result(path)
        provenance.write_result(other, found | {"settings": found.get("settings", {}) | {"seed": 7}})
    elif path.suffix == ".jsonl":
        results = types.SimpleNamespace(run_sha256="of another")
        results.end_of_line = lambda text: Results.end_of_line(results, text)
        rows = [json.loads(line) | {"queries": 7} for line in path.read_bytes().splitlines()]
        other.write_bytes(b"".join(Results.to_line(results, row) for row in rows))
    else:
        other.write_bytes(path.read_bytes()[::-1])
    return other.read_bytes()


def mutated(content, other, files, generator):
    """The content of a file, with one random fault."""
    position, changed = int(generator.integers(len(content))), bytearray(content)
    fault = generator.choice(
        ["bit", "byte", "digit", "cut", "gap", "more", "zeros", "run", "file"], p=[0.3, *[0.0875] * 8]
    )
    if fault == "bit":
        changed[position] ^= 1 << int(generator.integers(8))
    elif fault == "byte":
        changed[position] = int(generator.integers(256))
    elif fault == "digit":
        digits = [match.start() for match in re.finditer(rb"\d", content[:4000])] or [position]
        changed[generator.choice(digits)] = ord("0") + int(generator.integers(10))
    elif fault == "cut":
        del changed[position:]
    elif fault == "gap":
        del changed[position : position + int(generator.integers(1, 99))]
    elif fault == "more":
        changed[position:position] = content[:: int(generator.integers(1, 9))]
    elif fault == "zeros":
        changed[position : position + 99] = bytes(len(content[position : position + 99]))
    return {"run": other, "file": generator.choice(files).read_bytes() if files else b""}.get(fault, bytes(changed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [35, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_damaged_or_foreign_file_changes_no_value(made, tmp_path, monkeypatch, kind, count):
    """It is refused in one line, or made again; the rows of an attack that are left are those that were written."""
    files = Files(made, tmp_path, monkeypatch)
    path, read = getattr(files, kind)()
    beside = [file for file in tmp_path.rglob("*.*") if file.suffix == path.suffix and file != path]
    content, expected, outcomes = path.read_bytes(), frozen(read()), []
    other, generator = of_another_run(path, tmp_path), np.random.Generator(np.random.PCG64(len(kind)))
    for number in range(count):
        path.write_bytes(mutated(content, other, beside, generator))
        try:
            found = frozen(read())
            assert found == expected or kind == "attack_lines" and all(row in expected for row in found), number
            outcomes.append("equal")
        except BadInput as error:
            assert "\n" not in str(error), number
            outcomes.append("refused")
    path.write_bytes(content)
    assert frozen(read()) == expected
    assert len(set(outcomes)) == (1 if kind in ("tokens", "encoding") else 2) or "refused" in outcomes


@pytest.mark.parametrize(
    "name, file, more",
    [
        ("draw", "ticket.safetensors", []),
        ("attack", "none-vanilla-seed0/deepwordbug.jsonl", []),
        ("finetune", "export/model.safetensors", ["--export-hf", "{mine}/export"]),
    ],
)
def test_a_command_waits_for_another_that_writes_the_same_files(again, tmp_path, monkeypatch, name, file, more):
    mine = tmp_path / "runs" / "tiny" / "mine"
    (mine / "export").mkdir()
    is_held, is_waiting, lines = threading.Event(), threading.Event(), []

    def hold():
        with filelock.FileLock(f"{mine / file}.lock"):
            is_held.set()
            is_waiting.wait()
            lines.append("released")

    def print_waiting(line, **_):
        if line.startswith("another command"):
            lines.append(line)
            is_waiting.set()

    monkeypatch.setattr(distributed, "print", print_waiting, raising=False)
    threading.Thread(target=hold, daemon=True).start()
    is_held.wait()
    assert again(name, *(flag.format(mine=mine) for flag in more)) == 0
    assert lines == [f"another command is writing {mine / file}: waiting until it ends", "released"]


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_folder(again, tmp_path, capsys, monkeypatch):
    (tmp_path / "no_folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no_folder"))
    for name in ("search", "finetune"):
        assert again(name) == 0
        assert f"cannot write {tmp_path}/no_folder/orticket/" in (printed := capsys.readouterr().out)
        assert "Not a directory: using a temporary folder instead\n" in printed and "reusing" in printed


def test_a_cache_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    path = tmp_path / "file"
    monkeypatch.setattr(cache, "writable", None)
    path.write_text("kept")
    assert cache.get(path, Path.read_text, None) == "kept"


def test_a_cache_that_is_removed_while_it_is_opened_is_made_again(tmp_path):
    path, read = tmp_path / "folder" / "words.txt", []
    path.parent.mkdir()
    path.write_text("old")

    def remove_and_read(path):
        read.append(path)
        if len(read) == 1:
            path.unlink()
        return path.read_text()

    assert cache.get(path, remove_and_read, lambda path: path.write_text("new")) == "new" and len(read) == 2


def test_a_damaged_cache_is_made_again_with_a_line(made, tmp_path, monkeypatch, capsys):
    files = Files(made, tmp_path, monkeypatch)
    for kind in ("tokens", "encoding"):
        path, read = getattr(files, kind)()
        content, expected = path.read_bytes(), frozen(read())
        path.write_bytes(content[: len(content) // 2])
        capsys.readouterr()
        assert frozen(read()) == expected and path.read_bytes() == content
        assert re.fullmatch(rf"{path} is .*: making it again\n", capsys.readouterr().out)


def test_a_cache_is_made_again_after_an_edit(made, source, tmp_path, monkeypatch):
    files = Files(made, tmp_path, monkeypatch)
    for kind, function in (("tokens", "token_stream"), ("encoding", "encode")):
        _, read = getattr(files, kind)()
        edit_text(source / "inputs" / "batches.py")
        with monkeypatch.context() as patch:
            patch.setattr(batches, function, None)
            read()
            edit_function(source / "inputs" / "batches.py", function)
            with pytest.raises(TypeError):  # calls it
                read()


def test_tensors_of_another_model_are_named(tmp_path):
    tensors = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    for name, other, message in (
        ("weight", torch.ones(3, 2), r"weight is torch.float32 \(3, 2\), not torch.float32 \(2, 3\)"),
        ("bias", torch.ones(2).double(), r"bias is torch.float64 \(2,\), not torch.float32 \(2,\)"),
        ("bias", None, r"bias is None, not torch.float32 \(2,\)"),
        ("more", torch.ones(1), r"more is torch.float32 \(1,\), not None"),
    ):
        changed = {key: tensor for key, tensor in (tensors | {name: other}).items() if tensor is not None}
        with pytest.raises(BadInput, match=message):
            provenance.load_module(torch.nn.Linear(3, 2), changed, tmp_path)


@pytest.fixture
def windows(monkeypatch):
    """As on Windows, a file that is open or mapped cannot be replaced or removed, and some functions are missing."""

    def checked(function):
        def call_checked(*paths, **more):
            used = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
            used |= {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
            for path in map(os.path.realpath, paths):
                if path in used and not more:
                    raise PermissionError(13, "in use", path)
            return function(*paths, **more)

        return call_checked

    for name in ("replace", "rename", "remove", "unlink"):
        monkeypatch.setattr(os, name, checked(getattr(os, name)))
    monkeypatch.delattr(os, "getppid")


def test_no_file_is_replaced_or_removed_while_it_is_in_use_and_all_are_closed(again, windows):
    """Each script is told to overwrite, interrupted, and resumed. Python warns of files that are not closed."""
    original = our_safetensors.write_safetensors

    def interrupted(path, *rest):
        original(path, *rest)
        if str(path).endswith(("search.state.safetensors", "finetune.state.safetensors", "seed0.state.safetensors")):
            raise KeyboardInterrupt

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for name in ("search", "finetune", "baselines.robustt"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(our_safetensors, "write_safetensors", interrupted)
                assert again(name, "--overwrite") == 130
            assert again(name, "--overwrite") == 0
        assert again("draw", "--overwrite") == again("attack", "--overwrite") == again("attack") == 0
        gc.collect()
    assert not [str(warning.message) for warning in warned if warning.category is ResourceWarning]


def test_memory_is_released_where_the_system_does_what_linux_does(monkeypatch):
    tensors, file = our_safetensors.MappedTensors(), unittest.mock.Mock()
    tensors.files.append(file)
    for platform, calls in (("win32", 0), ("darwin", 0), ("linux", 1)):
        monkeypatch.setattr(sys, "platform", platform)
        tensors.release()
        assert file.madvise.call_count == calls


def test_text_has_the_same_bytes_on_windows(tmp_path, monkeypatch):
    def open_on_windows(*arguments, newline=None, **more):
        return open(*arguments, newline="\r\n" if newline is None else newline, **more)

    monkeypatch.setattr(runtime_files, "open", open_on_windows, raising=False)
    runtime_files.write_json(tmp_path / "text", {"a": 1})
    assert (tmp_path / "text").read_bytes() == b'{\n  "a": 1\n}\n'


@pytest.mark.slow
def test_with_python_x_dev_and_w_error_nothing_is_printed_to_standard_error(again, made, tmp_path):
    code = "import gc, sys\nsys.path.insert(0, '.')\nfrom importlib import import_module\n"
    for name, command in made.commands.items():
        command = [str(tmp_path / "runs" if part == made.folder / "runs" else part) for part in command]
        command += ["--overwrite", *(["--export-hf", str(tmp_path / "export")] if name == "finetune" else [])]
        code += f"sys.argv = {[name, *command]!r}\nimport_module({name!r}).main()\ngc.collect()\n"
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code], cwd=HERE, capture_output=True, text=True
    )
    assert ended.returncode == 0 and without_progress(ended.stderr) == "", ended.stderr


@pytest.mark.parametrize(
    "name, maker, result",
    [
        ("draw", "search", "coefficients.safetensors"),
        ("baselines.robustt", "finetune", "mine/none-vanilla-seed0/model.safetensors"),
        ("attack", "finetune", "mine/none-vanilla-seed0/model.safetensors"),
        ("finetune", "draw", "mine/ticket.safetensors"),
    ],
)
def test_an_input_that_other_code_made_is_named(again, source, tmp_path, capsys, name, maker, result):
    more = ["--ticket", "drawn"] if name == "finetune" else []
    edit_text(source / "bert.py")
    assert again(name, *more) == 0 and "note:" not in capsys.readouterr().out
    edit_function(source / f"{maker}.py", "main")
    assert again(name, *more, "--overwrite") == 0
    path = tmp_path / "runs" / "tiny" / result
    expected = f"note: {path} was made by other code ({maker}.py): repeat the command that made it, with --overwrite"
    assert capsys.readouterr().out.count(expected) == 1


def test_code_of_a_foreign_file_is_compared_only_if_it_can_be(source, capsys):
    for code in (None, [], "draw", {}):
        note_other_code("ticket", {"script": "robustt.py", "code": code})
        assert ("note: ticket was made by other code (baselines/robustt.py, " in capsys.readouterr().out) == (
            code == {}
        )
