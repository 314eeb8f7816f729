"""The baselines of bench.py: transformers and TextAttack, used as their documentation shows, and as fast as it allows.

The name of a side of transformers lists its settings. SDPA or eager: the implementation of attention. by length: the
Trainer's option group_by_length. compiled: torch.compile.
"""

import os
import tempfile
from types import SimpleNamespace

import torch

import data
from attacks import resources
from runtime import files
from runtime.device import autocast, pick_device, pick_precision

os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def is_baseline(side):
    return side.startswith(("transformers", "textattack"))


def load(kind, folder, side, device, dynamic=None):
    """A model of transformers."""
    import transformers

    attention = "eager" if "eager" in side else "sdpa"
    model = getattr(transformers, kind).from_pretrained(folder, attn_implementation=attention).to(device)
    if "compiled" in side:
        model.compile(dynamic=dynamic)
    return model


def masked_lm(folder, side, ids, positions, labels):
    """(BertForMaskedLM, loss_of(delta)), as in FreeLB's and EarlyRobust's published scripts: with the logits of all
    tokens, and delta added to the input embeddings. There are no coefficients."""
    model = load("BertForMaskedLM", folder, side, ids.device)
    mask, wanted = torch.ones_like(ids), torch.full_like(ids.flatten(), -100)
    wanted[positions] = labels
    wanted = wanted.view(ids.shape)

    def loss_of(delta):
        words = model.get_input_embeddings()(ids) + delta
        return model(inputs_embeds=words, attention_mask=mask, labels=wanted).loss

    return model, loss_of


def classifier(folder, side, rows, test, batch_size, max_length, device):
    """BertForSequenceClassification as the Trainer trains it: random batches, or batches of similar length, each padded
    to its longest row by DataCollatorWithPadding. rows, test: [(tuple of texts, label)]."""
    from transformers import BertTokenizerFast, DataCollatorWithPadding
    from transformers.trainer_pt_utils import get_length_grouped_indices

    model = load("BertForSequenceClassification", folder, side, device, dynamic=True)
    tokenizer = BertTokenizerFast.from_pretrained(folder)

    def loader(rows, shuffle):
        columns = zip(*(texts for texts, _ in rows))
        encoded = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
        features = [{key: encoded[key][i] for key in encoded} | {"label": label} for i, (_, label) in enumerate(rows)]
        how = {"shuffle": shuffle}
        if "by length" in side:
            # LengthGroupedSampler calls this with pools of 50 batches, or of fewer if there are fewer than 200 batches.
            # These rows stand for a whole task, so the pools have 50 batches here, too.
            lengths = [len(ids) for ids in encoded["input_ids"]]
            how = {"sampler": get_length_grouped_indices(lengths, batch_size, mega_batch_mult=50)}
        return torch.utils.data.DataLoader(features, batch_size, collate_fn=DataCollatorWithPadding(tokenizer), **how)

    train, test = loader(rows, True), loader(test, False)

    def forward(batch):
        return model(**{name: tensor.to(device) for name, tensor in batch.items()})

    def steps():
        for batch in train:
            loss = forward(batch).loss
            loss.backward()
            yield loss.detach()

    def classify():
        right = [(forward(batch).logits.argmax(1).cpu() == batch["labels"]).sum().item() for batch in test]
        return sum(right) / len(test.dataset)

    def loss():
        with torch.no_grad():
            return sum(forward(batch).loss * len(batch["labels"]) for batch in train) / len(rows)

    tokens = sum(len(of["input_ids"]) for of in train.dataset)
    return SimpleNamespace(modules=[model], steps=steps, loss=loss, classify=classify, tokens=tokens)


def restore_textattack(recipe, textattack, options, pads_to_longest=False):
    """Change the recipe of attack.py back to TextAttack's own model wrapper, batches and masked-LM transformation. Both
    sides share the word vectors, the tagger and the encoder's weights. pads_to_longest: pad to the longest text
    of a batch, as users of the wrapper may, where TextAttack pads to 512 tokens."""
    import transformers

    folder = files.model_folder(options.output, options.model) / files.task_folder(options.task)
    folder, device = folder / files.run_name(options), pick_device(options.device)
    dtype = pick_precision(device, options.precision)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval().to(device)

    class Wrapper(textattack.models.wrappers.HuggingFaceModelWrapper):
        def __call__(self, texts):
            with autocast(device, dtype):
                if not pads_to_longest:
                    return super().__call__(texts).float()
                inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
                with torch.no_grad():
                    return self.model(**inputs.to(device)).logits.float()

    recipe.goal_function.model = Wrapper(model, tokenizer)
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
            if constraint.metric == "angular":
                module = textattack.constraints.semantics.sentence_encoders.sentence_encoder
                constraint.sim_metric = module.get_angular_sim
    if options.attack == "bertattack":
        with tempfile.TemporaryDirectory() as copy:
            recipe.transformation.substitutes.model.save(copy, ("0", "1"), {})
            masked_lm = transformers.BertForMaskedLM.from_pretrained(copy)
        settings = {"max_candidates": options.bert_attack_k, "tokenizer": encoder_tokenizer}
        recipe.transformation = textattack.transformations.WordSwapMaskedLM(
            method="bert-attack", masked_language_model=masked_lm, **settings
        )
