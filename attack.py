"""Attack a fine-tuned model by word substitution: TextFooler (Jin et al. 2020), TextBugger (Li et al. 2019),
BERT-Attack (Li et al. 2020), DeepWordBug (Gao et al. 2018), and bertattack-fudan, from the code of the authors' group.

    python attack.py --task rt --attack textfooler         the model of finetune.py --task rt
    python attack.py --task rt --attack all --ticket none  all attacks on the full model
    python attack.py --task sst2 --model FOLDER            any model with a classifier, local or from the hub
    torchrun --nproc-per-node 4 -- attack.py --task rt     four processes share the examples

The recipes are TextAttack's. Their resources (word vectors, sentence encoder, part-of-speech tagger, masked language
model) are replaced where the papers' own are not available, and the output says so. The metrics are the paper's:
Clean% is the accuracy on all test rows. Aua% is the accuracy under attack on the --n attacked rows. Suc% is the share
of attacks that succeed on correctly classified rows. #Query is the mean number of queries of all attacks on these rows.
In the model's folder, ATTACK.jsonl has a line per example, ATTACK.json a summary. Interrupted runs resume when rerun.
"""

import runtime.start  # noqa: F401 # isort: skip

import hashlib
import shlex
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import data
from attacks import resources
from attacks.library import import_textattack, package_versions
from attacks.recipes import RECIPES, build
from attacks.results import Results, print_table
from bert import Bert
from checkpoints import huggingface
from checkpoints.provenance import software
from checkpoints.runs import read_metrics
from freelb import ADVERSARIES
from inputs.finetuned import load_finetuned
from inputs.tokenizer import Tokenizer
from runtime import cli, distributed, files
from runtime.cli import BadInput, option
from runtime.device import DEFAULT_MODEL, precision_name


@dataclass
class Options(data.TaskOptions):
    attack: str = option("textfooler", "all: every attack in turn", choices=(*RECIPES, "all"), group="attack")
    n: int = option(None, "test rows to attack [300, or all if there are fewer]", at_least=1, group="attack")
    attack_columns: str = option(None, "column of a pair to change [both, except in NLI recipes]", group="attack")
    seed: int = option(0, "seed of fine-tuning and of random edits", at_least=0, below=2**31, group="attack")
    sample_seed: int = option(None, "seed of the sample of test rows [--seed]", at_least=0, below=2**31, group="attack")
    model: str = option(DEFAULT_MODEL, "the pre-trained model that was fine-tuned, or a classifier", group="model")
    revision: str = option(None, "branch or commit of a model on the hub", group="model")
    ticket: str = option("drawn", "as in finetune.py: drawn, none, random, or a file", group="model")
    ticket_seed: int = option(None, "as in finetune.py", at_least=0, below=2**63, group="model")
    method: str = option("vanilla", "as in finetune.py", choices=tuple(ADVERSARIES), group="model")
    ablation: str = option(None, "as in finetune.py", choices=("no-initialization", "no-structure"), group="model")
    max_length: int = option(None, "tokens per text [same as in fine-tuning]", at_least=3, group="model")
    task: str = option("rt", f"{', '.join(data.TASKS)}; a .csv, .tsv or .jsonl file, or a folder", group="data")
    vectors: str = option(None, "bundled, textattack or a .npz file [textattack if cached]", group="resources")
    min_cosine: float = option(0.5, "minimum similarity of substitutes", at_least=-1, at_most=1, group="resources")
    encoder: str = option("use-multilingual", "sentence encoder", choices=resources.ENCODERS, group="resources")
    masked_lm: str = option(None, "masked LM of BERT-Attack [the pre-trained or default model]", group="resources")
    bert_attack_k: int = option(48, "candidates per word in BERT-Attack", at_least=1, group="resources")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto: CUDA, then MPS, then CPU", group="machine")
    precision: str = option("fp32", "auto: bf16 where supported", choices=("auto", "bf16", "fp32"), group="machine")
    output: str = option("runs", "folder that finetune.py wrote to", group="output")
    suffix: str = option(None, "name the result files ATTACK-SUFFIX", group="output")
    show: int = option(0, "successful attacks to print, with changed words marked", at_least=0, group="output")
    overwrite: bool = option(False, "replace results; an unfinished run of this command resumes", group="output")


NOT_SETTINGS = (
    *("output", "suffix", "show", "overwrite", "device"),  # do not affect the results
    *("vectors", "min_cosine", "encoder", "masked_lm", "bert_attack_k"),  # recorded as resources instead
)


def main():
    options = cli.parse(Options, __doc__)
    package_versions()  # ends here without the packages of requirements-attack.txt
    rank, world, launcher = distributed.RANK, distributed.WORLD, distributed.parent()
    device, dtype = distributed.start(options)
    task = data.find_task(options.task, tuple(options.text_columns), options.label_column, options.drop_labels)
    if options.attack_columns not in (None, *task.columns):
        raise BadInput(f"--attack-columns {options.attack_columns}: {options.task} has {' and '.join(task.columns)}")
    splits = task.load(options.data_revision)
    test = splits["test"]
    options.n = options.n or min(300, len(test))
    victim, folder, provenance = find_victim(options, task, splits, device, dtype)
    del splits  # frees the training rows
    examples = {number: test[number] for number in sample(options, len(test))}
    provenance["task_sha256"] = hashlib.sha256(repr(examples).encode("utf8", "surrogatepass")).hexdigest()
    clean = clean_accuracy(options, folder, victim, test)

    textattack, nltk_data = import_textattack()
    table, problems = {}, []
    try:
        for name in RECIPES if options.attack == "all" else (options.attack,):
            attack, used = build(textattack, nltk_data, name, options, task, victim)
            for resource, description in used.items():
                print(f"{name}, {resource}: {description}")
            path = folder / f"{'-'.join(filter(None, (name, options.suffix)))}.jsonl"
            with distributed.file_lock(files.writable(folder) / path.name):
                results = Results(path, provenance, name, used, list(examples), options.overwrite)
                bar = cli.progress(len(examples), len(results.rows), name, "example", faster="torchrun")
                try:
                    for number in list(examples)[rank::world]:
                        if number in results.rows:
                            continue
                        textattack.shared.utils.set_seed((options.seed * 1_000_003 + number) % 2**32)  # of each row
                        results.add(attack_example(attack, task, number, *examples[number]))
                        results.show(bar, world > 1)
                        stop_without_launcher(launcher)
                    while rank == 0 and len(results.rows) < len(examples):  # other processes are still at work
                        time.sleep(0.2)
                        results.show(bar, True)
                        stop_without_launcher(launcher)
                finally:
                    bar.close()
                    if rank == 0:
                        table[name], problem = results.summarize(clean, options.show)
                        problems += [problem] if problem else []
        distributed.shutdown()
        if problems:
            raise BadInput("; ".join(problems))
    finally:
        print_table(table)


def stop_without_launcher(launcher):
    """Raise BadInput if torchrun, which started this process, is gone, and perhaps other processes with it."""
    if distributed.WORLD > 1 and distributed.parent() != launcher:
        raise BadInput("torchrun has ended: run the same command again to resume")


def find_victim(options, task, splits, device, dtype):
    """Load the model under attack: the one that finetune.py wrote, or else --model itself if it has a classifier.

    Returns (resources.TextModel, folder for the results, provenance of the results), and sets options.masked_lm to its
    default. Raises BadInput if there is no such model, with the finetune.py command, or if it does not fit the task.
    """
    folder = files.model_folder(options.output, options.model) / files.task_folder(options.task)
    run = folder / files.run_name(options)
    same = ("model", "output", "ticket", "ticket_seed", "method", "ablation", "seed")
    same += ("data_revision", *data.COLUMN_OPTIONS)
    remedy = f"python finetune.py --task {shlex.quote(options.task)}{cli.flags(options, *same)} makes one"
    if (run / "model.safetensors").is_file():
        model, tokenizer, max_length, _ = load_finetuned(run, task, splits, options, device)
        sha256, class_names, masked_lm = files.sha256(run / "model.safetensors"), task.labels, options.model
        folder = run
    elif options.model in data.BUNDLED or options.model in data.ON_HUB:
        raise BadInput(f"there is no fine-tuned model in {run}: {remedy}")
    elif options.ticket not in ("drawn", "none") or options.method != "vanilla" or options.ablation:
        given = cli.flags(options, "ticket", "method", "ablation")
        raise BadInput(f"there is no fine-tuned model in {run}: {remedy}; or leave out{given}")
    else:
        path, sha256 = data.find_model(options.model, options.revision)
        model, tokenizer, max_length = Bert.load(path), Tokenizer(path), task.max_length
        class_names, masked_lm = huggingface.label_names(path), DEFAULT_MODEL
        if model.config.num_labels != len(task.labels) or {"pooler", "classifier"} & set(model.initialized):
            raise BadInput(f"{path} has no classifier for the {len(task.labels)} classes of {options.task}: {remedy}")
        align_labels(model, class_names, task.labels)
    max_length = min(options.max_length or max_length, model.config.max_length)
    options.masked_lm = options.masked_lm or masked_lm
    settings = {name: value for name, value in asdict(options).items() if name not in NOT_SETTINGS}
    settings |= {"precision": precision_name(dtype), "max_length": max_length}
    settings |= {"classes": list(class_names), "ticket": Path(options.ticket).name}
    provenance = {"script": "attack.py", "settings": settings, "model_sha256": sha256, **software(__file__)}
    provenance["versions"] |= package_versions()
    return resources.TextModel(model, tokenizer, max_length, device, dtype), folder, provenance


def align_labels(model, names, labels):
    """Reorder a classifier's classes, called `names`, to the task's `labels`, or print the order that is assumed."""
    wanted = tuple(labels)
    if set(names) != set(wanted):
        names = tuple(name.lower() for name in names)
        wanted = tuple(label.lower() for label in wanted)
    if len(set(names)) == len(names) and sorted(names) == sorted(wanted):
        position = {name: i for i, name in enumerate(names)}
        order = [position[name] for name in wanted]
        for parameter in model.classifier.parameters():  # (classes, d) and (classes,)
            parameter.data = parameter.data[order]
    else:
        shown = ", ".join(names) or "(unnamed)"
        print(f"the model's classes {shown} are assumed to be {', '.join(labels)}, in this order")


def sample(options, rows):
    """The numbers of the attacked test rows, shuffled by --sample-seed. A larger --n extends a smaller sample.

    Raises BadInput if there are fewer rows.
    """
    if options.n > rows:
        raise BadInput(f"--n {options.n} is more than the {rows:,} test rows of {options.task}")
    seed = options.seed if options.sample_seed is None else options.sample_seed
    return np.random.Generator(np.random.PCG64(seed)).permutation(rows)[: options.n].tolist()


def clean_accuracy(options, folder, victim, test):
    """Clean%, the accuracy on all test rows: measured by finetune.py, or here for classifiers and with --max-length."""
    if options.max_length is None and (folder / "metrics.json").is_file():
        metrics = read_metrics(folder)
        accuracy, source = metrics["test_accuracy"], f", measured by finetune.py in {metrics['settings']['precision']}"
    else:
        predicted = victim([texts for texts, _ in test]).argmax(1)
        accuracy, source = (predicted == torch.tensor([label for _, label in test])).float().mean().item(), ""
    print(f"attacking {options.n} of {len(test):,} test rows; {folder} has {accuracy:.2%} accuracy{source}")
    if accuracy < 1 / victim.model.config.num_labels:
        print("this is below chance: check the order of the model's classes and the preprocessing of its texts")
    return accuracy


def attack_example(attack, task, number, texts, label):
    """Attack the test row `number`. Returns its row of the results."""
    row = {"example": number, "label": task.labels[label], "original": texts[0] if len(texts) == 1 else texts}
    clear_caches(attack)
    attack.candidates = 0
    try:
        result = attack.attack(OrderedDict(zip(task.columns, texts)), label)
    except Exception as error:  # an error in TextAttack on one text must not end a run of hours
        return row | {"outcome": "error", "reason": cli.one_line(error)}
    before, after = result.original_result, result.perturbed_result
    vectors = resources.shared_encoder()([before.attacked_text.text, after.attacked_text.text])
    outcome = type(result).__name__.removesuffix("AttackResult").lower()  # skipped: misclassified without an attack
    return row | {
        "outcome": "succeeded" if outcome == "successful" else outcome,
        "perturbed": after.attacked_text.tokenizer_input,  # a text, or a tuple of two
        "predicted": task.labels[before.output],
        "predicted_after": task.labels[after.output],
        "probabilities": [round(p, 4) for p in before.raw_output.tolist()],
        "probabilities_after": [round(p, 4) for p in after.raw_output.tolist()],
        "queries": result.num_queries,
        "words": len(before.attacked_text.words),
        "words_changed": before.attacked_text.words_diff_num(after.attacked_text),
        "candidates": attack.candidates,
        "similarity": round((vectors[0] @ vectors[1]).item(), 4),
    }


def clear_caches(attack):
    """Make each result independent of the examples that this process attacked before."""
    for model in (attack.goal_function.model, *(getattr(c, "model", None) for c in attack.constraints)):
        if hasattr(model, "cache"):
            model.cache.clear()


if __name__ == "__main__":
    cli.run(main)
