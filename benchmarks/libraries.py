"""The baselines of bench.py: transformers and TextAttack, used as their documentation shows."""

import os
import tempfile
from types import SimpleNamespace

import torch

import data
from attacks import resources
from freelb import freelb, initial_delta
from runtime import files
from runtime.device import pick_device

os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def freelb_step(loss_of, mask, dim, adversary):
    """The loss and gradients of FreeLB, for both sides. adversary: as in ADVERSARIES."""
    steps, lr, init_mag, max_norm, _ = adversary
    return freelb(loss_of, initial_delta(mask, dim, init_mag, max_norm), mask, steps, lr, max_norm)


def search_work(folder, attention, is_compiled, batch):
    """([BertForMaskedLM], loss_of(delta)), as in FreeLB's and EarlyRobust's published scripts: with the logits of all
    tokens, and delta added to the input embeddings. There are no coefficients."""
    from transformers import BertForMaskedLM

    ids, positions, labels = batch
    model = BertForMaskedLM.from_pretrained(folder, attn_implementation=attention).to(ids.device)
    if is_compiled:
        model.compile()
    mask, wanted = torch.ones_like(ids), torch.full_like(ids.flatten(), -100)
    wanted[positions] = labels
    wanted = wanted.view(ids.shape)

    def loss_of(delta):
        words = model.get_input_embeddings()(ids) + delta
        return model(inputs_embeds=words, attention_mask=mask, labels=wanted).loss

    return [model], loss_of


def finetune_work(folder, attention, is_compiled, rows, test, batch_size, max_length, device):
    """BertForSequenceClassification as the Trainer trains it by default: random batches, each padded to its longest row
    by DataCollatorWithPadding; compiled, to a multiple of 32 tokens. rows, test: [(tuple of texts, label)]."""
    from transformers import BertForSequenceClassification, BertTokenizerFast, DataCollatorWithPadding

    model = BertForSequenceClassification.from_pretrained(folder, attn_implementation=attention).to(device)
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=32 if is_compiled else None)
    if is_compiled:
        model.compile()

    def loader(rows, shuffle):
        columns = zip(*(texts for texts, _ in rows))
        encoded = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
        features = [{key: encoded[key][i] for key in encoded} | {"label": label} for i, (_, label) in enumerate(rows)]
        return torch.utils.data.DataLoader(features, batch_size, shuffle=shuffle, collate_fn=collate)

    train, test = loader(rows, True), loader(test, False)

    def forward(batch):
        return model(**{name: tensor.to(device) for name, tensor in batch.items()})

    def steps():
        for batch in train:
            loss = forward(batch).loss
            loss.backward()
            yield loss.detach()

    def classify():
        return sum((forward(batch).logits.argmax(1).cpu() == batch["labels"]).sum().item() for batch in test)

    def loss():
        with torch.no_grad():
            return sum(forward(batch).loss * len(batch["labels"]) for batch in train) / len(rows)

    tokens = sum(len(of["input_ids"]) for of in train.dataset)
    return SimpleNamespace(modules=[model], steps=steps, loss=loss, classify=classify, tokens=tokens)


def restore_textattack(recipe, textattack, options):
    """Change the recipe of attack.py back to TextAttack's own model wrapper, batches and masked-LM transformation. Both
    sides share the word vectors, the tagger and the encoder's weights."""
    import transformers

    folder = files.model_folder(options.output, options.model) / files.task_folder(options.task)
    folder, device = folder / "none-vanilla-seed0", pick_device(options.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval().to(device)
    recipe.goal_function.model = textattack.models.wrappers.HuggingFaceModelWrapper(model, tokenizer)
    recipe.goal_function.batch_size = 32
    minilm, _ = data.find_model("minilm")
    multilingual = resources.UniversalSentenceEncoder().encode
    encoder = transformers.AutoModel.from_pretrained(minilm).eval().to(device)
    encoder_tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)

    def encode(texts):
        if options.encoder == "use-multilingual":
            return torch.from_numpy(multilingual(texts))
        batch = encoder_tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        batch = batch.to(device)
        with torch.no_grad():
            states = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))

    for constraint in recipe.constraints:
        if hasattr(constraint, "sim_metric"):
            constraint.model = encode
            vars(constraint).pop("_score_list", None)  # attack.py's, which encodes fewer texts
    if options.attack == "bertattack":
        with tempfile.TemporaryDirectory() as copy:
            recipe.transformation.substitutes.model.save(copy, ("0", "1"), {})
            masked_lm = transformers.BertForMaskedLM.from_pretrained(copy)
        settings = {"max_candidates": options.bert_attack_k, "tokenizer": encoder_tokenizer}
        recipe.transformation = textattack.transformations.WordSwapMaskedLM(
            method="bert-attack", masked_language_model=masked_lm, **settings
        )
