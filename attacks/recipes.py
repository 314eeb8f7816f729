"""The attacks: TextAttack's recipes, each with the resources that it needs.

An attack is one entry of RECIPES, a resource one entry of NEEDS. The resources themselves are in resources.py.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

import data
from attacks import resources
from bert import Bert
from inputs.mlm_head import find_mlm_head
from inputs.tokenizer import Tokenizer
from runtime.cli import BadInput


@dataclass(frozen=True)
class Recipe:
    build: object  # the name of a class in textattack.attack_recipes, or a function of (textattack, victim)
    needs: tuple  # keys of NEEDS


def bertattack_fudan(textattack, victim):
    """What the public code of the authors' group calls BERT-Attack: see docs/decisions.md."""
    constraints = textattack.constraints
    checks = [
        constraints.pre_transformation.RepeatModification(),
        constraints.pre_transformation.StopwordModification(),
        constraints.grammaticality.PartOfSpeech(allow_verb_noun_swap=True),
        constraints.semantics.sentence_encoders.UniversalSentenceEncoder(0.2, metric="cosine", window_size=15),
    ]
    goal = textattack.goal_functions.UntargetedClassification(victim)
    swap = textattack.transformations.WordSwapEmbedding(max_candidates=50)
    return textattack.Attack(goal, checks, swap, textattack.search_methods.GreedyWordSwapWIR(wir_method="delete"))


RECIPES = {
    "textfooler": Recipe("TextFoolerJin2019", ("word vectors", "part of speech", "sentence encoder")),
    "textbugger": Recipe("TextBuggerLi2018", ("word vectors", "stop words", "sentence encoder")),
    "bertattack": Recipe("BERTAttackLi2020", ("masked language model", "stop words", "sentence encoder")),
    "bertattack-fudan": Recipe(bertattack_fudan, ("word vectors", "stop words", "part of speech", "sentence encoder")),
    "deepwordbug": Recipe("DeepWordBugGao2018", ("stop words",)),
}


def build(textattack, nltk_data, name, options, task, victim):
    """Build the attack `name` on the victim, with `textattack` and `nltk_data` from library.import_textattack.
    Returns (TextAttack's Attack, {resource: description})."""
    setup = SimpleNamespace(textattack=textattack, nltk_data=nltk_data, options=options, victim=victim)
    attack = construct(setup, RECIPES[name].build)
    used = {need: NEEDS[need](setup, attack) for need in RECIPES[name].needs}
    attack.goal_function.batch_size = 2**30  # the victim makes its own batches
    if options.attack_columns:
        fixed = set(task.columns) - {options.attack_columns}
        kind = textattack.constraints.pre_transformation.InputColumnModification
        constraints = [of for of in attack.pre_transformation_constraints if not isinstance(of, kind)]
        attack.pre_transformation_constraints = [*constraints, kind(list(task.columns), fixed)]
    attack.candidates, transform = 0, attack.search_method.get_transformations

    def count_candidates(*arguments, **more):  # to tell when no word of a text has a substitute
        texts = transform(*arguments, **more)
        attack.candidates += len(texts)
        return texts

    attack.search_method.get_transformations = count_candidates
    return attack, used


def construct(setup, recipe):
    """TextAttack's Attack, still without the word vectors and the masked language model, which it would download."""
    textattack, shared = setup.textattack, setup.textattack.shared
    setup.embedding = shared.WordEmbedding(None, {}, [])

    def without_model(swap, method, **_):
        vars(swap).update(dict.fromkeys(swap.extra_repr_keys()), method=method)

    vectors = mock.patch.object(shared.WordEmbedding, "counterfitted_GLOVE_embedding", lambda: setup.embedding)
    model = mock.patch.object(textattack.transformations.WordSwapMaskedLM, "__init__", without_model)
    with vectors, model:
        if callable(recipe):
            return recipe(textattack, setup.victim)
        return getattr(textattack.attack_recipes, recipe).build(setup.victim)


def word_vectors(setup, attack):
    """Put the vectors into the embedding that the attack's parts share. The recipe's bound becomes --min-cosine."""
    synonyms, embedding = resources.find_synonyms(setup.options.vectors, setup.options.min_cosine), setup.embedding
    embedding._word2index = {word: number for number, word in enumerate(synonyms.words)}
    embedding._index2word, embedding.embedding_matrix = synonyms.words, synonyms.vectors
    embedding.get_cos_sim, embedding.nearest_neighbours = synonyms.cosine, cache(synonyms.neighbours)
    for constraint in attack.constraints:
        if isinstance(constraint, setup.textattack.constraints.semantics.WordEmbeddingDistance):
            constraint.min_cos_sim = setup.options.min_cosine
    return synonyms.description


def stop_words(setup, attack):
    if setup.nltk_data["stopwords"]:
        return "NLTK's"
    kind = setup.textattack.constraints.pre_transformation.StopwordModification
    textfooler = construct(SimpleNamespace(**vars(setup)), RECIPES["textfooler"].build)
    words = next(of.stopwords for of in textfooler.pre_transformation_constraints if isinstance(of, kind))
    for constraint in attack.pre_transformation_constraints:
        if isinstance(constraint, kind):
            constraint.stopwords = words
    return "TextFooler's list (the papers': NLTK's)"


def part_of_speech(setup, attack):
    if setup.nltk_data["averaged_perceptron_tagger_eng"] and setup.nltk_data["universal_tagset"]:
        return "NLTK's averaged perceptron"
    kind = setup.textattack.constraints.grammaticality.PartOfSpeech
    attack.constraints = [constraint for constraint in attack.constraints if not isinstance(constraint, kind)]
    return "constraint left out, NLTK's tagger is not there (the papers': it is used)"


def sentence_encoder(setup, attack):
    encoder, description = resources.find_encoder(setup.options.encoder, setup.victim.device, setup.victim.dtype)
    for constraint in attack.constraints:
        if isinstance(constraint, setup.textattack.constraints.semantics.sentence_encoders.SentenceEncoder):
            constraint.model = encoder
            if constraint.metric == "angular":
                constraint.sim_metric = angular_similarity
            if constraint.skip_text_shorter_than_window:
                encode_only_if_needed(constraint)
    return description


def angular_similarity(vectors, others):
    """TextAttack's, (n, d) and (n, d) -> (n,), but never NaN. The cosine of equal vectors may be rounded to more than
    1, which has no arc cosine; the most similar text would then be rejected."""
    return 1 - F.cosine_similarity(vectors, others).clamp(-1, 1).acos() / math.pi


def encode_only_if_needed(constraint):
    """Encode nothing if all texts are too short for a sentence constraint to apply."""
    score_list = constraint._score_list

    def _score_list(original, texts):
        is_needed = any(len(text.words) >= constraint.window_size for text in texts)
        return score_list(original, texts) if is_needed else torch.ones(len(texts))

    constraint._score_list = _score_list


def masked_language_model(setup, attack):
    """The substitutes of BERT-Attack."""
    options, victim = setup.options, setup.victim
    name, k = options.masked_lm, options.bert_attack_k
    path, sha256 = data.find_model(name, options.revision if name == options.model else None)
    model, tokenizer = Bert.load(path, mlm=True), Tokenizer(path)
    description = f"{Path(name).name}, sha256 {sha256[:8]}, k = {k}"
    if name != "bert-base-uncased":
        description = f"not the paper's bert-base-uncased but {description}"
    if "mlm_head" in model.initialized:
        metadata = find_mlm_head(name, options.output, model, sha256, tokenizer, victim.device)
        how = ", ".join(f"{setting.replace('_', ' ')} {value}" for setting, value in metadata["settings"].items())
        description += f", with a head fitted to it on a corpus of sha256 {metadata['corpus_sha256'][:8]}, {how}"
    if k > tokenizer.size:
        raise BadInput(f"--bert-attack-k {k} is more than the {tokenizer.size:,} tokens of {name}")
    words_of = setup.textattack.shared.utils.words_from_text
    words = resources.MaskedWords(model, tokenizer, k, lambda text: len(words_of(text)), victim.device, victim.dtype)
    attack.transformation._get_transformations, attack.transformation.substitutes = words.transform, words
    return description


NEEDS = {  # resource -> function of (setup, attack) that gives it to the attack and returns its description
    "word vectors": word_vectors,
    "stop words": stop_words,
    "part of speech": part_of_speech,
    "sentence encoder": sentence_encoder,
    "masked language model": masked_language_model,
}
