"""Speed side by side with Hugging Face transformers, as ratios on the same work in the same run.

    python bench.py search                    one FreeLB step on masked language modelling
    python bench.py search --attention eager  against transformers' plain attention rather than its default, SDPA
    python bench.py search --same-allocator   the peer with our allocator setting as well
    python bench.py load                      a checkpoint of BERT-base's size, in each format
    python bench.py attack                    TextFooler on the full MiniLM that finetune.py made, and by TextAttack
    python bench.py attack --attack bertattack --n 4 --rounds 1

Each side runs in a process of its own, as its users would start it, the sides in turn; the first steps of each warm
up and are not counted. Both start from the same weights and see the same batches, and their losses (dropout off), the
sums of what they loaded or the texts they found are compared, so that a fast wrong answer cannot win.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

import attack
import data
import runtime
from bert import Bert, Config
from freelb import freelb
from gates import Coefficients
from published import read_weights
from runtime import BadInput, option
from tensorflow1 import MAGIC, crc32c

SIDES = ("orticket", "transformers")
ADVERSARY = {"lr": 0.03, "init_mag": 0.05, "max_norm": 0.2}


@dataclass
class Options:
    what: str = option("search", "what to time", choices=("search", "load", "attack"), positional=True)
    batch_size: int = option(32, "examples a step", at_least=1)
    block: int = option(128, "tokens an example", at_least=8)
    adv_steps: int = option(3, "K, FreeLB's ascent steps", at_least=1)
    steps: int = option(3, "counted steps in each process", at_least=1)
    rounds: int = option(3, "processes of each side, in turn", at_least=1)
    attention: str = option("sdpa", "the peer's attention", choices=("sdpa", "eager"))
    same_allocator: bool = option(False, "give the peer, too, runtime.keep_memory()")
    attack: str = option("textfooler", "which attack", choices=tuple(attack.RECIPES))
    task: str = option("rt", "whose test rows are attacked; the model is that of finetune.py --task TASK --ticket none")
    n: int = option(20, "test rows that are attacked", at_least=1)
    vectors: str = option(None, "word vectors, as of attack.py")
    output: str = option("runs", "folder that finetune.py wrote to")
    json: str = option(None, "also write the figures to this file")
    worker: str = option(None, "internal: SIDE,CASE,FOLDER, one process of one side")


def main():
    options = runtime.parse(Options, __doc__)
    if options.worker:
        work = {"search": time_search, "load": time_load, "attack": time_attack}[options.what]
        return work(options, *options.worker.split(","))
    with tempfile.TemporaryDirectory() as folder:
        work = {"search": bench_search, "load": bench_load, "attack": bench_attack}[options.what]
        figures = work(options, Path(folder))
    if options.json:
        runtime.write_json(options.json, {" ".join(case): row for case, row in figures.items()})


def in_turn(options, cases, folder):
    """{case: [what each of its processes found]}: every round starts one process a case."""
    runs = {case: [] for case in cases}
    bar = runtime.progress(options.rounds * len(cases), description="processes")
    for _ in range(options.rounds):
        for case in cases:
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", ",".join((*case, str(folder)))]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                raise BadInput(f"{' '.join(case)} failed: {ended.stderr.strip().splitlines()[-1]}")
            runs[case].append(json.loads(ended.stdout.splitlines()[-1]))
            bar.update()
    bar.close()
    return runs


def agree(values, tolerance):
    """Raises BadInput where the sides did not do the same work."""
    if max(values) - min(values) > tolerance:
        raise BadInput(f"the sides differ by {max(values) - min(values):.4g}: they do not do the same work")


# ------------------------------------------------------------------------------------------------------- search


def bench_search(options, folder):
    device = runtime.pick_device()
    precisions = ["fp32"] if runtime.pick_precision(device, "auto") == torch.float32 else ["bf16", "fp32"]
    Bert.load(data.find_model("minilm")[0], mlm=True).save(folder, (), {})
    figures = {}
    for case, results in in_turn(options, [(s, precision) for precision in precisions for s in SIDES], folder).items():
        seconds = statistics.median(second for result in results for second in result["seconds"])
        memory = max(result["memory"] for result in results) / 1e9
        figures[case] = {"seconds": seconds, "memory_gb": memory, "loss": results[0]["loss"]}
    print(
        f"FreeLB step, MiniLM, K = {options.adv_steps}, {options.batch_size} x {options.block} tokens, "
        f"{runtime.describe(device)}; transformers with {options.attention} attention; "
        f"medians of {options.rounds} x {options.steps} steps"
    )
    print("                       seconds  tokens/s  peak GB     loss  times orticket's", precisions[0])
    fastest = figures["orticket", precisions[0]]["seconds"]
    for (side, precision), row in figures.items():
        rate = options.batch_size * options.block / row["seconds"]
        print(f"{side:>14s} in {precision}  {row['seconds']:8.2f}  {rate:8,.0f}  {row['memory_gb']:7.2f}", end="  ")
        print(f"{row['loss']:7.4f}  {row['seconds'] / fastest:8.2f}")
    agree([row["loss"] for row in figures.values()], 0.02)
    return figures


def time_search(options, side, precision, folder):
    """One process of one side: prints {"loss", "seconds" of each counted step, "memory" in bytes} as JSON."""
    device = runtime.pick_device()
    dtype = runtime.pick_precision(device, precision)
    if side == "orticket" or options.same_allocator:
        runtime.keep_memory()
    torch.manual_seed(0)
    ids = torch.randint(1000, 30000, (options.batch_size, options.block), device=device)
    positions = (torch.rand(ids.shape, device=device) < 0.15).flatten().nonzero().flatten()
    tokens, labels = torch.ones_like(ids), ids.flatten()[positions]
    if side == "orticket":
        loss_of, parameters, train = ours(folder, ids, positions, labels, device)
    else:
        loss_of, parameters, train = peer(folder, ids, positions, labels, device, options.attention)
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, fused=True)

    def adversarial_loss():
        torch.manual_seed(1)  # the same delta on both sides
        with runtime.autocast(device, dtype):
            return freelb(loss_of, tokens, 384, options.adv_steps, **ADVERSARY)

    train(False)
    loss = adversarial_loss().item()
    optimizer.zero_grad()
    train(True)
    seconds = []
    for _ in range(2 + options.steps):
        start = time.perf_counter()
        adversarial_loss().item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"loss": loss, "seconds": seconds[2:], "memory": runtime.peak_memory(device)}))


def ours(folder, ids, positions, labels, device):
    model, c = Bert.load(folder, mlm=True).to(device), Coefficients(6, 12, 1536).to(device)

    def loss_of(delta):
        return model.mlm_loss(model(ids, keep=positions, gates=c.gates, delta=delta), labels)

    return loss_of, [*model.parameters(), *c.parameters()], model.train


def peer(folder, ids, positions, labels, device, attention):
    """transformers' BertForMaskedLM as FreeLB's published scripts drive it; it has no coefficients to learn."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(folder, attn_implementation=attention).to(device)
    mask, wanted = torch.ones_like(ids), torch.full_like(ids.flatten(), -100)
    wanted[positions] = labels
    wanted = wanted.view(ids.shape)

    def loss_of(delta):
        words = model.get_input_embeddings()(ids) + delta
        return model(inputs_embeds=words, attention_mask=mask, labels=wanted).loss

    return loss_of, list(model.parameters()), model.train


# --------------------------------------------------------------------------------------------------------- load


def bench_load(options, folder):
    """A file is mapped, not read, before its numbers are used: so the time until each was used once counts as well."""
    torch.manual_seed(0)
    model = Bert(Config(), mlm=True)
    for kind in ("safetensors", "bin", "tensorflow"):
        (folder / kind).mkdir()
        model.save(folder / kind, (), {})
    tensors = read_weights(folder / "safetensors")
    size = (folder / "safetensors" / "model.safetensors").stat().st_size
    torch.save(dict(tensors), folder / "bin" / "pytorch_model.bin")
    write_tensorflow(folder / "tensorflow" / "bert_model.ckpt", tensors)
    for kind in ("bin", "tensorflow"):
        (folder / kind / "model.safetensors").unlink()
    cases = [(side, kind) for kind in ("safetensors", "bin") for side in SIDES] + [("orticket", "tensorflow")]
    figures = {}
    for case, results in in_turn(options, cases, folder).items():
        figures[case] = {key: statistics.median(result[key] for result in results) for key in results[0]}
    print(
        f"loading BERT-base with MLM head, {size / 1e6:.0f} MB, {runtime.describe(torch.device('cpu'))}; "
        f"medians of {options.rounds} processes"
    )
    print("                             seconds  and each number used  peak memory / file  times transformers")
    for (side, kind), row in figures.items():
        against = row["used"] / figures["transformers", "bin" if kind == "bin" else "safetensors"]["used"]
        print(f"{side:>14s}, {kind:11s}  {row['seconds']:8.3f}  {row['used']:20.3f}", end="  ")
        print(f"{row['memory'] / size:18.2f}  {against:18.2f}")
    agree([row["sum"] for row in figures.values()], 0.1)
    return figures


def time_load(options, side, kind, folder):
    """Prints {"seconds" to load, "used": until every number was read, "memory" above that of torch, "sum"} as JSON."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    if side == "transformers":
        from transformers import BertForMaskedLM
    torch.ones(2**20).sum()
    cpu = torch.device("cpu")
    before, start = runtime.peak_memory(cpu), time.perf_counter()
    path = f"{folder}/{kind}"
    model = BertForMaskedLM.from_pretrained(path) if side == "transformers" else Bert.load(path, mlm=True)
    seconds = time.perf_counter() - start
    total = sum(p.sum(dtype=torch.float64).item() for p in model.parameters())
    used = time.perf_counter() - start
    memory = runtime.peak_memory(cpu) - before
    print(json.dumps({"seconds": seconds, "used": used, "memory": memory, "sum": total}))


def write_tensorflow(prefix, tensors):
    """A TensorFlow 1 checkpoint of published tensors, by the format that tensorflow1.py describes."""

    def varint(number):
        low = bytes([number & 127 | (128 if number > 127 else 0)])
        return low + (varint(number >> 7) if number > 127 else b"")

    def field(number, value):
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        return varint(number << 3 | 2) + varint(len(value)) + value

    def block(entries):
        body = b"".join(varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in entries)
        body += bytes(4) + (1).to_bytes(4, "little") + bytes(1)
        return body + crc32c(body).to_bytes(4, "little")

    entries, offset = [], 0
    with open(f"{prefix}.data-00000-of-00001", "wb") as file:
        for name, tensor in tensors.items():
            name = name.replace("layer.", "layer_").replace(".", "/")
            if name.endswith("_embeddings/weight"):
                name = name.removesuffix("/weight")
            elif tensor.dim() == 2:
                name, tensor = name.replace("/weight", "/kernel"), tensor.t()
            file.write(tensor.contiguous().numpy())
            shape = b"".join(field(2, field(1, size)) for size in tensor.shape)
            place = field(4, offset) + field(5, tensor.numel() * 4)
            entries.append((name.encode(), field(1, 1) + field(2, shape) + place))
            offset += tensor.numel() * 4
    content = block([(b"", field(1, 1)), *sorted(entries)])
    where = varint(0) + varint(len(content) - 5)
    index, empty = block([(b"~", where)]), block([])
    footer = varint(len(content)) + varint(len(empty) - 5) + varint(len(content) + len(empty)) + varint(len(index) - 5)
    footer = footer.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")
    Path(f"{prefix}.index").write_bytes(content + empty + index + footer)


# ------------------------------------------------------------------------------------------------------- attack

PARTS = ("the model", "sentence encoder", "part of speech", "substitutes", "the rest", "import")


def bench_attack(options, folder):
    """Seconds from the first to the last example; the import of TextAttack, the same for both, is shown apart."""
    cases = [("orticket", "fp32"), ("textattack", "fp32"), ("orticket", "bf16")]
    if runtime.pick_precision(runtime.pick_device(), "auto") == torch.float32:
        cases.pop()
    figures, found = {}, {}
    for case, results in in_turn(options, cases, folder).items():
        found[case] = results[0].pop("found")
        figures[case] = {part: statistics.median(result[part] for result in results) for part in PARTS}
        figures[case]["seconds"] = statistics.median(result["seconds"] for result in results)
        figures[case]["queries"] = sum(queries for _, _, queries in found[case])
    wanted = found["textattack", "fp32"]
    print(
        f"{options.attack} on {options.n} rows of {options.task}, {runtime.describe(runtime.pick_device())}; "
        f"seconds, medians of {options.rounds} processes"
    )
    print("                      in all  times orticket's  queries  same outcome  " + "  ".join(PARTS))
    for case, row in figures.items():
        same = sum(one == other for one, other in zip(found[case], wanted))
        parts = "  ".join(f"{row[part]:>{len(part)}.2f}" for part in PARTS)
        print(f"{case[0]:>12s} in {case[1]}  {row['seconds']:7.2f}", end="  ")
        print(f"{row['seconds'] / figures['orticket', 'fp32']['seconds']:16.2f}", end="  ")
        print(f"{row['queries']:7,}  {f'{same} of {options.n}':>12s}  {parts}")
    return figures


def time_attack(options, side, precision, folder):
    """Prints {"seconds", those of each of PARTS, "found": [[outcome, text, queries] of each example]} as JSON."""
    clock = dict.fromkeys(PARTS, 0.0)
    start = time.perf_counter()
    textattack, nltk_data = attack.import_textattack()
    clock["import"] = time.perf_counter() - start
    given = {"task": options.task, "output": options.output, "vectors": options.vectors, "n": options.n}
    given = attack.Options(attack=options.attack, ticket="none", precision=precision, max_length=512, **given)
    recipe, examples = (attack_of if side == "orticket" else unwrapped)(textattack, nltk_data, given)
    spend(clock, "the model", recipe.goal_function, "model")
    for constraint in recipe.constraints:
        for part, name in (("sentence encoder", "model"), ("part of speech", "_get_pos")):
            if hasattr(constraint, name):
                spend(clock, part, constraint, name)
    if options.attack == "bertattack":
        spend(clock, "substitutes", recipe.transformation, "_get_transformations")
    start, found = time.perf_counter(), []
    for number, (columns, label) in examples.items():
        textattack.shared.utils.set_seed(number)
        result = recipe.attack(columns, label)
        found.append((type(result).__name__, result.perturbed_result.attacked_text.text, result.num_queries))
    seconds = time.perf_counter() - start
    clock["the rest"] = seconds - sum(clock[part] for part in PARTS[:4])
    print(json.dumps(clock | {"seconds": seconds, "found": found}))


def spend(clock, part, owner, name):
    """Let calls of owner.name count as this part's time."""
    call = getattr(owner, name)

    def timed(*arguments):
        start = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            clock[part] += time.perf_counter() - start

    setattr(owner, name, timed)


def attack_of(textattack, nltk_data, options):
    """(the recipe as attack.py has it, {number: (columns, label)} of the rows it attacks)."""
    runtime.keep_memory()
    device = runtime.pick_device()
    task = data.find_task(options.task)
    victim, _, made_by = attack.find_victim(options, task, device, runtime.pick_precision(device, options.precision))
    recipe, _ = attack.build(textattack, nltk_data, options.attack, options, made_by, task, victim)
    test = task.load(None)["test"]
    rows = {number: test[number] for number in attack.sample(options, len(test))}
    return recipe, {i: (OrderedDict(zip(task.columns, texts)), label) for i, (texts, label) in rows.items()}


def unwrapped(textattack, nltk_data, options):
    """The same, as TextAttack's users run it: its wrapper around transformers' model, its batches, its masked-LM
    transformation. What stays is what the two have in common: word vectors, tagger, and the encoder's weights."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import transformers

    recipe, examples = attack_of(textattack, nltk_data, options)
    folder = runtime.model_folder(options.output, options.model) / options.task / "none-vanilla-seed0"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    recipe.goal_function.model = textattack.models.wrappers.HuggingFaceModelWrapper(model, tokenizer)
    recipe.goal_function.batch_size = 32
    minilm, _ = data.find_model("minilm")
    encoder = transformers.AutoModel.from_pretrained(minilm).eval()
    encoders_tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)

    def encode(texts):
        batch = encoders_tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            states = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))

    for constraint in recipe.constraints:
        if hasattr(constraint, "sim_metric"):
            constraint.model = encode
    if options.attack == "bertattack":
        with tempfile.TemporaryDirectory() as whole:
            ours = recipe.transformation.substitutes.model
            ours.save(whole, ("0", "1"), {})
            masked_lm = transformers.BertForMaskedLM.from_pretrained(whole)
        settings = {"max_candidates": options.bert_attack_k, "tokenizer": encoders_tokenizer}
        recipe.transformation = textattack.transformations.WordSwapMaskedLM(
            method="bert-attack", masked_language_model=masked_lm, **settings
        )
    return recipe, examples


if __name__ == "__main__":
    runtime.run(main)
