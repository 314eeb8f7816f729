"""TextAttack's recipes, with what they draw on laid where they look for it: synonyms, sentence vectors, part-of-speech
tags, stop words, a masked language model, each the papers' own or what can be had in its place (resources.py).

attack.py imports TextAttack, and hands it over.
"""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import data
from attacks import resources
from bert import Bert
from inputs.tokenizer import Tokenizer
from runtime.cli import BadInput

RECIPES = {
    "textfooler": "TextFoolerJin2019",
    "textbugger": "TextBuggerLi2018",
    "bertattack": "BERTAttackLi2020",
    "deepwordbug": "DeepWordBugGao2018",
}


def build(textattack, found, name, options, task, victim):
    """(TextAttack's recipe `name` against the victim, {resource: which one it uses}).

    The recipe is built by TextAttack, with what it draws on laid where it looks for it.
    """
    used, shared, recipes = {}, textattack.shared, textattack.attack_recipes
    synonyms = resources.find_synonyms(options.vectors)
    numbers = {word: number for number, word in enumerate(synonyms.words)}
    vectors = shared.WordEmbedding(synonyms.vectors, numbers, synonyms.words, synonyms.neighbours)
    if synonyms.vectors is None:
        vectors.get_cos_sim = synonyms.cosine
    shared.utils.GLOBAL_OBJECTS["textattack_counterfitted_GLOVE_embedding"] = vectors
    if name in ("textfooler", "textbugger"):
        used["word vectors"] = synonyms.description
    if not found["stopwords"]:
        of_textfooler = recipes.TextFoolerJin2019.build(victim).pre_transformation_constraints
        words = next(constraint.stopwords for constraint in of_textfooler if hasattr(constraint, "stopwords"))
        sys.modules["nltk"].corpus.stopwords = SimpleNamespace(words=lambda language: words)
    if name != "textfooler":
        used["stop words"] = "NLTK's" if found["stopwords"] else "TextFooler's list (the papers': NLTK's)"
    swap = None
    if name == "bertattack":
        swap, used["masked language model"] = masked_swap(textattack, options, victim)
    with mock.patch.object(recipes.bert_attack_li_2020, "WordSwapMaskedLM", lambda **_: swap):
        attack = getattr(recipes, RECIPES[name]).build(victim)
    attack.goal_function.batch_size = 2**30  # the victim makes its own batches
    for constraint in list(attack.constraints):
        if isinstance(constraint, textattack.constraints.semantics.sentence_encoders.SentenceEncoder):
            used["sentence encoder"] = "Universal Sentence Encoder"
            if options.encoder == "minilm":
                constraint.model = resources.Encoder(victim.device, victim.dtype)
                if constraint.skip_text_shorter_than_window:
                    leave_short_texts(constraint)
                used["sentence encoder"] = constraint.model.description
            elif importlib.util.find_spec("tensorflow_hub") is None:
                raise BadInput("--encoder use needs the package tensorflow_hub: pip install it, or --encoder minilm")
        if isinstance(constraint, textattack.constraints.grammaticality.PartOfSpeech):
            used["part of speech"] = "NLTK's averaged perceptron"
            if not (found["averaged_perceptron_tagger_eng"] and found["universal_tagset"]):
                attack.constraints.remove(constraint)
                used["part of speech"] = "constraint left out, NLTK's tagger is not there (the papers': it is used)"
    if options.attack_columns:
        others = {column for column in task.columns if column != options.attack_columns}
        kind = textattack.constraints.pre_transformation.InputColumnModification
        constraints = [of for of in attack.pre_transformation_constraints if not isinstance(of, kind)]
        attack.pre_transformation_constraints = [*constraints, kind(list(task.columns), others)]
    return attack, used


def leave_short_texts(constraint):
    """Where all texts are so short that a sentence constraint passes them whatever their similarity, compute none."""
    score = constraint._score_list

    def _score_list(start, texts):
        count = any(len(text.words) >= constraint.window_size for text in texts)
        return score(start, texts) if count else torch.ones(len(texts))

    constraint._score_list = _score_list


def masked_swap(textattack, options, victim):
    """(BERT-Attack's transformation with a masked language model of ours, which one that is)."""
    name = options.masked_lm
    path, sha256 = data.find_model(name, options.revision if name == options.model else None)
    model, tokenizer = Bert.load(path, mlm=True), Tokenizer(path)
    which = f"{Path(name).name}, sha256 {sha256[:8]}"
    if "mlm_head" in model.initialized:
        import search  # here, so that --help need not wait for it

        metadata = search.find_mlm_head(name, options.output, model, sha256, tokenizer, victim.device)
        how = ", ".join(f"{setting.replace('_', ' ')} {value}" for setting, value in metadata["settings"].items())
        which += f", with a head fitted to it on a corpus of sha256 {metadata['corpus_sha256'][:8]}, {how}"
    k, ranking = options.bert_attack_k, options.bert_attack_ranking
    if k > tokenizer.size:
        raise BadInput(f"--bert-attack-k {k} is more than the {tokenizer.size:,} tokens of {name}")
    substitutes = resources.MaskedWords(model, tokenizer, k, ranking, victim.device, victim.dtype)
    mask = tokenizer.library.id_to_token(tokenizer.mask)

    class WordSwapMaskedLM(textattack.transformations.WordSwap):
        """TextAttack's transformation of this name with method "bert-attack", as far as BERT-Attack uses it."""

        def _get_transformations(self, current_text, indices_to_modify):
            transformed = []
            for i in indices_to_modify:
                word, masked_text = current_text.words[i], current_text.replace_word_at_index(i, mask).text
                for substitute in substitutes(current_text.text, masked_text, word, count_words, i == 0):
                    if substitute.strip("Ġ") != word:
                        transformed.append(current_text.replace_word_at_index(i, substitute.strip("Ġ")))
            return transformed

    def count_words(text):
        return len(textattack.shared.utils.words_from_text(text))

    swap = WordSwapMaskedLM()
    swap.substitutes = substitutes
    return swap, f"{which} (BERT-Attack's: bert-base-uncased), k = {k}, in the order of the {ranking}"
