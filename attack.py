"""Attack a fine-tuned model with word substitutions: TextFooler (Jin et al. 2020), TextBugger (Li et al. 2019),
BERT-Attack (Li et al. 2020), DeepWordBug (Gao et al. 2018).

    python attack.py --task rt --attack textfooler         what finetune.py --task rt made
    python attack.py --task rt --attack all --ticket none  all four, on the full model
    python attack.py --task sst2 --model FOLDER            any model with a classifier head, also one on the hub

The recipes are TextAttack's own objects; what they draw on (synonyms, sentence vectors, part-of-speech tags, a masked
language model) is exchanged where the papers' cannot be had, and a line says so. The figures are the paper's:
Clean% accuracy on all test rows; Aua% accuracy under attack, of all --n examples; Suc% the share of attacks that
succeed, on those classified rightly before; #Query the mean number of queries of such an attack. Below OUTPUT, beside
the model: ATTACK.jsonl, a line an example, and ATTACK.json, a summary. Killed and typed again, the command goes on.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import logging
import os
import shlex
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import editdistance
import numpy as np
import torch

import data
import finetune
from attacks import resources
from attacks.recipes import RECIPES, build
from attacks.results import Results, print_table
from bert import Bert
from checkpoints import huggingface
from checkpoints.provenance import versions
from inputs import hub
from inputs.tokenizer import Tokenizer
from runtime import cli, files
from runtime.cli import BadInput, option
from runtime.cpu import keep_memory
from runtime.device import DEFAULT_MODEL, pick_device, pick_precision, precision_name, run_banner


@dataclass
class Options:
    attack: str = option("textfooler", "which; all: one after another", choices=(*RECIPES, "all"))
    task: str = option("rt", f"{', '.join(data.TASKS)}; or a file of one's own: .csv, .tsv, .jsonl")
    text_columns: tuple = option(("text",), "of one's own file: the column with the text, or two for pairs")
    label_column: str = option("label", "of one's own file")
    data_revision: str = option(None, "branch or commit of the task on the hub, instead of the pinned one")
    model: str = option(DEFAULT_MODEL, "the model that was fine-tuned; or one with a classifier head of its own")
    revision: str = option(None, "branch or commit of a model on the hub")
    ticket: str = option("drawn", "as of finetune.py: drawn, none, random, or a file")
    method: str = option("vanilla", "as of finetune.py", choices=tuple(finetune.ADVERSARIES))
    ablation: str = option(None, "as of finetune.py", choices=finetune.ABLATIONS)
    output: str = option("runs", "folder that finetune.py wrote to")
    seed: int = option(0, "of the fine-tuning, of the choice of examples and of random edits", at_least=0, below=2**31)
    n: int = option(None, "test rows that are attacked [300, or all of fewer]", at_least=1)
    attack_columns: str = option(
        None, "of pairs: the column that may be changed, instead of both (TextFooler: the hypothesis of a premise)"
    )
    vectors: str = option(None, "word vectors: embedded, textattack (its cache, the default where there), an .npz file")
    encoder: str = option("minilm", "of sentences; use: Universal Sentence Encoder", choices=("minilm", "use"))
    masked_lm: str = option(
        None,
        "BERT-Attack's masked language model, instead of what --model was before fine-tuning; of a model with a "
        f"classifier of its own, instead of {DEFAULT_MODEL}",
    )
    bert_attack_k: int = option(48, "substitutes a word that BERT-Attack considers; TextAttack's, too", at_least=1)
    bert_attack_ranking: str = option(
        "loop", "of a word's combinations: loop, as TextAttack does, or as it means to", choices=("loop", "perplexity")
    )
    max_length: int = option(None, "tokens a text is cut to, instead of the model's at its fine-tuning", at_least=3)
    precision: str = option("fp32", "of matrix products; auto: bf16 where it is fast", choices=("auto", "bf16", "fp32"))
    workers: int = option(1, "processes that share the examples; torchrun may start them as well", at_least=1)
    show: int = option(0, "successful attacks to print, the changed words marked", at_least=0)
    overwrite: bool = option(False, "replace results that other settings made in the same folder")


NOT_SETTINGS = (
    *("output", "workers", "show", "overwrite"),  # they change neither the results nor whose they are
    *("vectors", "encoder", "masked_lm", "bert_attack_k", "bert_attack_ranking"),  # the resources tell what they chose
)


def main():
    options = cli.parse(Options, __doc__)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", options.workers))
    parent = os.getppid()
    if rank:
        sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    keep_memory()
    device = pick_device()
    dtype = pick_precision(device, options.precision)
    print(run_banner(options.model, device, dtype))
    task = data.find_task(options.task, tuple(options.text_columns), options.label_column)
    if options.attack_columns not in (None, *task.columns):
        raise BadInput(f"--attack-columns {options.attack_columns}: {options.task} has {' and '.join(task.columns)}")
    splits = task.load(options.data_revision)
    test = splits["test"]
    options.n = options.n or min(300, len(test))
    victim, folder, provenance = find_victim(options, task, splits, device, dtype)
    del splits  # the training rows
    examples = {number: test[number] for number in sample(options, len(test))}
    # with --max-length, at another length than finetune.py has measured it
    clean, precision = clean_accuracy(None if options.max_length else folder, victim, test)
    right = f"{clean:.2%} right" + f", as finetune.py found in {precision}" * (precision is not None)
    print(f"attacking {options.n} of {len(test):,} test rows, of which {folder} gets {right}")
    provenance["task_sha256"] = hashlib.sha256(repr(examples).encode("utf8", "surrogatepass")).hexdigest()
    helpers = start_helpers(options.workers) if "RANK" not in os.environ else []
    table = {}
    try:
        textattack, found = import_textattack()
        similar = resources.Encoder(device, torch.float32)
        for name in RECIPES if options.attack == "all" else (options.attack,):
            attack, used = build(textattack, found, name, options, task, victim)
            print("\n".join(f"{name}, {what}: {which}" for what, which in used.items()))
            results = Results(folder / f"{name}.jsonl", provenance, name, used, list(examples), options.overwrite)
            bar = cli.progress(len(examples), len(results.rows), name, "example")
            try:
                for place, number in enumerate(examples):
                    if rank and os.getppid() != parent:
                        return  # whoever started this helper is gone
                    if place % world == rank and number not in results.rows:
                        textattack.shared.utils.set_seed((options.seed * 1_000_003 + number) % 2**32)
                        results.add(attack_one(attack, task, similar, number, *examples[number]))
                        results.show(bar, world > 1)
                        check(helpers)
                while rank == 0 and len(results.rows) < len(examples):  # the others are still at theirs
                    time.sleep(0.2)
                    results.show(bar, True)
                    check(helpers)
                    if os.getppid() != parent and "RANK" in os.environ:
                        raise BadInput("torchrun, and the other processes with it, are gone: the same command goes on")
            finally:
                bar.close()
                if rank == 0:
                    table[name] = results.summarize(clean, options.show)
    finally:
        for helper in helpers:
            helper.kill()
        if table:
            print_table(table)


# --------------------------------------------------------------------------------------------------------- victim


def find_victim(options, task, splits, device, dtype):
    """(the Classifier under attack, folder for the results, how they are made): what finetune.py made of --model, or
    --model itself where it has a classifier head.

    Raises BadInput where there is neither, with the command that makes it, and as finetune.reload does.
    """
    folder = files.model_folder(options.output, options.model) / files.task_folder(options.task)
    run = folder / files.run_name(options)
    same = ("model", "output", "ticket", "method", "ablation", "seed", "text_columns", "label_column", "data_revision")
    given = cli.flags(options, *same)
    makes = f"python finetune.py --task {shlex.quote(options.task)}{given} makes one"
    if (run / "model.safetensors").is_file():
        model, tokenizer, length, _ = finetune.reload(run, task, splits, options, device)
        folder, masked_lm, sha256 = run, options.model, files.sha256(run / "model.safetensors")
        names = task.labels
    elif options.model in data.EMBEDDED or options.model in data.ON_HUB:
        raise BadInput(f"there is no fine-tuned model in {run}: {makes}")
    elif options.ticket not in ("drawn", "none") or options.method != "vanilla" or options.ablation:
        given = cli.flags(options, "ticket", "method", "ablation")
        raise BadInput(f"there is no fine-tuned model in {run}: {makes}; or leave out{given}")
    else:
        path, sha256 = data.find_model(options.model, options.revision)
        model, tokenizer, length, masked_lm = Bert.load(path), Tokenizer(path), task.max_length, None
        if model.config.num_labels != len(task.labels) or {"pooler", "classifier"} & set(model.initialized):
            raise BadInput(f"{path} has no classifier for the {len(task.labels)} classes of {options.task}: {makes}")
        names = huggingface.label_names(path)
        in_order(model, names, task.labels)
    length = min(options.max_length or length, model.config.max_length)
    options.masked_lm = options.masked_lm or masked_lm or DEFAULT_MODEL
    settings = {name: value for name, value in asdict(options).items() if name not in NOT_SETTINGS}
    settings |= {"precision": precision_name(dtype), "max_length": length}
    settings["classes"] = list(names)
    settings["ticket"] = Path(options.ticket).name
    packages = versions() | {name: importlib.metadata.version(name) for name in ("textattack", "nltk")}
    provenance = {"script": "attack.py", "settings": settings, "model_sha256": sha256, "versions": packages}
    return resources.Classifier(model, tokenizer, length, device, dtype), folder, provenance


def in_order(model, names, labels):
    """Put the classes of a classifier that calls them `names` into the order of the task's; where these are not the
    same words, that is printed and the order taken as it is."""
    wanted = tuple(labels)
    if set(names) != set(wanted):
        names, wanted = (tuple(name.lower() for name in of) for of in (names, wanted))
    if len(set(names)) == len(names) and sorted(names) == sorted(wanted):
        for parameter in model.classifier.parameters():  # (classes, d) and (classes,)
            parameter.data = parameter.data[[names.index(name) for name in wanted]]
    elif names and not all(name.startswith("label_") for name in names):
        print(f"the model's classes {', '.join(names)} are taken for {', '.join(labels)}, in this order")


def sample(options, rows):
    """The numbers of the test rows that are attacked, in their order; a larger --n begins with those of a smaller.

    Raises BadInput where there are not so many.
    """
    if options.n > rows:
        raise BadInput(f"--n {options.n} is more than the {rows:,} test rows of {options.task}")
    return np.random.Generator(np.random.PCG64(options.seed)).permutation(rows)[: options.n].tolist()


def clean_accuracy(folder, victim, test):
    """(the share of all test rows that the victim classifies rightly, None); in `folder` finetune.py may have measured
    it, then (that, the precision in which it did)."""
    if folder is not None and (folder / "metrics.json").is_file():
        metrics = files.read_json(folder / "metrics.json")
        return metrics["test_accuracy"], metrics["settings"]["precision"]
    predicted = victim([texts for texts, _ in test]).argmax(1)
    return (predicted == torch.tensor([label for _, label in test])).float().mean().item(), None


# --------------------------------------------------------------------------------------------------------- TextAttack


def import_textattack():
    """(the package, which of NLTK's data are there: {package: bool}). To import it takes NLTK's stop words, and starts
    downloads that never time out: both are seen to before."""
    import nltk

    found = find_nltk_data(nltk)
    if not found["stopwords"]:
        nltk.corpus.stopwords = SimpleNamespace(words=lambda language: [])
    marker = Path(os.environ.get("TA_CACHE_DIR") or Path.home() / ".cache" / "textattack") / "post_install_check_3"
    marked = marker.exists()
    logging.disable(logging.WARNING)
    # with TA_CACHE_DIR it moves the caches of everybody: the environment is put back
    with mock.patch.dict(os.environ), mock.patch.object(nltk, "download"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import textattack
    logging.disable(logging.NOTSET)
    if not marked:
        marker.unlink(missing_ok=True)  # TextAttack on its own shall still fetch what it wants
    for name in ("textattack.shared.utils.install", "jieba"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return textattack, found


NLTK = {
    "stopwords": "corpora/stopwords",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng",
    "universal_tagset": "taggers/universal_tagset",
}


def find_nltk_data(nltk):
    """{package: whether NLTK has it}, fetched now if need be and possible; NLTK verifies what it fetches."""

    def is_there(folder):
        for path in (folder, f"{folder}.zip"):
            with contextlib.suppress(LookupError):
                return bool(nltk.data.find(path))
        return False

    found, reachable = {}, not hub.offline()
    for package, folder in NLTK.items():
        if not is_there(folder) and reachable:
            patience = mock.patch.object(nltk.downloader, "NETWORK_TIMEOUT", hub.TIMEOUT[1])
            reachable = False
            # NLTK says what went wrong, but for a sign-in page in place of its index, which is a SyntaxError
            with patience, warnings.catch_warnings(), contextlib.suppress(SyntaxError):
                warnings.simplefilter("ignore")
                reachable = nltk.download(package, quiet=True, print_error_to=io.StringIO())
        found[package] = is_there(folder)
    return found


# --------------------------------------------------------------------------------------------------------- results


def attack_one(attack, task, similar, number, texts, label):
    """A line of the results: what became of the test row `number` under attack."""
    row = {"example": number, "label": task.labels[label], "original": as_given(texts)}
    forget(attack)
    try:
        result = attack.attack(OrderedDict(zip(task.columns, texts)), label)
    except Exception as error:  # whatever goes wrong inside TextAttack on one text must not end a run of hours
        return row | {"outcome": "error", "reason": cli.one_line(error)}
    before, after = result.original_result, result.perturbed_result
    words = before.attacked_text.words, after.attacked_text.words
    vectors = similar([before.attacked_text.text, after.attacked_text.text])
    outcome = type(result).__name__.removesuffix("AttackResult").lower()
    return row | {
        "outcome": {"successful": "succeeded"}.get(outcome, outcome),  # or failed, or skipped: misclassified before
        "perturbed": as_given(after.attacked_text.tokenizer_input),
        "predicted": task.labels[before.output],
        "predicted_after": task.labels[after.output],
        "probabilities": [round(p, 4) for p in before.raw_output.tolist()],
        "probabilities_after": [round(p, 4) for p in after.raw_output.tolist()],
        "queries": result.num_queries,
        "words": len(words[0]),
        "words_changed": editdistance.eval(*words),
        "similarity": round((vectors[0] @ vectors[1]).item(), 4),
    }


def forget(attack):
    """Let each example be on its own, whichever a process had before."""
    for model in (attack.goal_function.model, *(getattr(c, "model", None) for c in attack.constraints)):
        if isinstance(model, resources.Texts):
            model.known.clear()


def as_given(texts):
    """A text as a string, a pair as a list of two."""
    return texts if isinstance(texts, str) else texts[0] if len(texts) == 1 else list(texts)


# ------------------------------------------------------------------------------------------------ several processes


def start_helpers(workers):
    """The other processes: this command again, told its rank as torchrun tells it, in turn on each GPU."""
    cards = max(1, torch.cuda.device_count())
    return [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank % cards), "WORLD_SIZE": str(workers)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(1, workers)
    ]


def check(helpers):
    """Raises BadInput with the last words of a process that failed."""
    for helper in helpers:
        if helper.poll():
            raise BadInput(f"a process failed: {cli.last_words(helper.stderr.read(), helper.returncode)}")


if __name__ == "__main__":
    cli.run(main)
