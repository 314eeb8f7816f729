"""TextAttack's recipes, built on the resources that are available: see resources.py."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import data
from attacks import resources
from bert import Bert
from inputs.mlm_head import find_mlm_head
from inputs.tokenizer import Tokenizer
from runtime.cli import BadInput

RECIPES = {
    "textfooler": "TextFoolerJin2019",
    "textbugger": "TextBuggerLi2018",
    "bertattack": "BERTAttackLi2020",
    "deepwordbug": "DeepWordBugGao2018",
}


def build(textattack, nltk_data, name, options, task, victim):
    """Build the recipe `name` against the victim, with `textattack` and `nltk_data` from library.import_textattack.
    Returns (TextAttack's Attack, {resource: description})."""
    used, recipes = {}, textattack.attack_recipes
    synonyms = resources.find_synonyms(options.vectors)
    number_of = {word: number for number, word in enumerate(synonyms.words)}
    embedding = textattack.shared.WordEmbedding(synonyms.vectors, number_of, synonyms.words, synonyms.neighbours)
    if synonyms.vectors is None:
        embedding.get_cos_sim = synonyms.cosine
    textattack.shared.utils.GLOBAL_OBJECTS["textattack_counterfitted_GLOVE_embedding"] = embedding
    if name in ("textfooler", "textbugger"):
        used["word vectors"] = synonyms.description

    if not nltk_data["stopwords"]:
        textfooler = recipes.TextFoolerJin2019.build(victim)
        words = next(of.stopwords for of in textfooler.pre_transformation_constraints if hasattr(of, "stopwords"))
        sys.modules["nltk"].corpus.stopwords = SimpleNamespace(words=lambda language: words)
    if name != "textfooler":
        used["stop words"] = "NLTK's" if nltk_data["stopwords"] else "TextFooler's list (the papers': NLTK's)"

    swap = None
    if name == "bertattack":
        swap, used["masked language model"] = masked_swap(textattack, options, victim)
    with mock.patch.object(recipes.bert_attack_li_2020, "WordSwapMaskedLM", lambda **_: swap):
        attack = getattr(recipes, RECIPES[name]).build(victim)
    attack.goal_function.batch_size = 2**30  # the victim makes its own batches

    for constraint in list(attack.constraints):
        if isinstance(constraint, textattack.constraints.semantics.sentence_encoders.SentenceEncoder):
            used["sentence encoder"] = set_encoder(constraint, options.encoder, victim)
        if isinstance(constraint, textattack.constraints.grammaticality.PartOfSpeech):
            used["part of speech"] = "NLTK's averaged perceptron"
            if not (nltk_data["averaged_perceptron_tagger_eng"] and nltk_data["universal_tagset"]):
                attack.constraints.remove(constraint)
                used["part of speech"] = "constraint left out, NLTK's tagger is not there (the papers': it is used)"

    if options.attack_columns:
        fixed = set(task.columns) - {options.attack_columns}
        kind = textattack.constraints.pre_transformation.InputColumnModification
        constraints = [of for of in attack.pre_transformation_constraints if not isinstance(of, kind)]
        attack.pre_transformation_constraints = [*constraints, kind(list(task.columns), fixed)]
    return attack, used


def set_encoder(constraint, name, victim):
    """Give a sentence constraint the encoder `name`. Returns its description."""
    if name == "use":
        if importlib.util.find_spec("tensorflow_hub") is None:
            raise BadInput("--encoder use needs the package tensorflow_hub: pip install it, or --encoder minilm")
        return "Universal Sentence Encoder"
    constraint.model = resources.SentenceEncoder(victim.device, victim.dtype)
    if constraint.skip_text_shorter_than_window:
        score_list = constraint._score_list

        def _score_list(original, texts):  # encode nothing if all texts are too short for the constraint to apply
            is_needed = any(len(text.words) >= constraint.window_size for text in texts)
            return score_list(original, texts) if is_needed else torch.ones(len(texts))

        constraint._score_list = _score_list
    return constraint.model.description


def masked_swap(textattack, options, victim):
    """(BERT-Attack's transformation with our masked language model, description of the model)."""
    name, k = options.masked_lm, options.bert_attack_k
    path, sha256 = data.find_model(name, options.revision if name == options.model else None)
    model, tokenizer = Bert.load(path, mlm=True), Tokenizer(path)
    description = f"{Path(name).name}, sha256 {sha256[:8]}"
    if "mlm_head" in model.initialized:
        metadata = find_mlm_head(name, options.output, model, sha256, tokenizer, victim.device)
        how = ", ".join(f"{setting.replace('_', ' ')} {value}" for setting, value in metadata["settings"].items())
        description += f", with a head fitted to it on a corpus of sha256 {metadata['corpus_sha256'][:8]}, {how}"
    if k > tokenizer.size:
        raise BadInput(f"--bert-attack-k {k} is more than the {tokenizer.size:,} tokens of {name}")
    substitutes = resources.MaskedWords(model, tokenizer, k, victim.device, victim.dtype)
    mask = tokenizer.library.id_to_token(tokenizer.mask)

    def count_words(text):
        return len(textattack.shared.utils.words_from_text(text))

    def _get_transformations(current_text, indices_to_modify):  # the part of WordSwapMaskedLM that BERT-Attack uses
        transformed = []
        for i in indices_to_modify:
            word, masked_text = current_text.words[i], current_text.replace_word_at_index(i, mask).text
            for substitute in substitutes(current_text.text, masked_text, word, count_words, i == 0):
                if substitute.strip("Ġ") != word:
                    transformed.append(current_text.replace_word_at_index(i, substitute.strip("Ġ")))
        return transformed

    swap = textattack.transformations.WordSwap()
    swap._get_transformations, swap.substitutes = _get_transformations, substitutes
    return swap, f"{description} (BERT-Attack's: bert-base-uncased), k = {k}"
