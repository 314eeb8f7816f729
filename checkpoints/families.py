"""The families of models that `bert.py` runs: what distinguishes their published files and their forward passes.

A new family is one more entry in FAMILIES. docs/forks.md adds one.
"""

from dataclasses import dataclass, field

import torch

# padding, unknown, before a text, after it, masked
SPECIAL_TOKENS = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),  # WordPiece
    "roberta": ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),  # byte-level BPE
}
# transformers' tokenizers that read vocab.txt, or vocab.json with merges.txt, as inputs/tokenizer.py does
TOKENIZERS = {
    "bert": ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "ConvBertTokenizer", "MobileBertTokenizer"),
    "roberta": ("RobertaTokenizer", "LongformerTokenizer", "BartTokenizer"),
}
# published name without the family's prefix -> name in bert.py; {} is the layer's number
ENCODER = {
    "embeddings.word_embeddings": "word_embeddings",
    "embeddings.position_embeddings": "position_embeddings",
    "embeddings.token_type_embeddings": "segment_embeddings",
    "embeddings.LayerNorm": "embedding_norm",
    "encoder.layer.{}.attention.self.query": "layers.{}.query",  # three published tensors, one in bert.py
    "encoder.layer.{}.attention.self.key": "layers.{}.key",
    "encoder.layer.{}.attention.self.value": "layers.{}.value",
    "encoder.layer.{}.attention.output.dense": "layers.{}.attention_output",
    "encoder.layer.{}.attention.output.LayerNorm": "layers.{}.attention_norm",
    "encoder.layer.{}.intermediate.dense": "layers.{}.intermediate",
    "encoder.layer.{}.output.dense": "layers.{}.output",
    "encoder.layer.{}.output.LayerNorm": "layers.{}.output_norm",
}


@dataclass(frozen=True)
class Family:
    """One value of model_type, which is also the prefix of the encoder's tensors."""

    name: str  # in the names of transformers' classes
    heads: dict  # published name, with a prefix if it has one -> name in bert.py; pooler, classifier and MLM head
    encoder: dict = field(default_factory=lambda: ENCODER)
    config: dict = field(default_factory=dict)  # name in bert.Config -> in config.json, where they differ
    defaults: dict = field(default_factory=dict)  # of bert.Config, where config.json does not have them
    vocabulary: str = "bert"  # a key of SPECIAL_TOKENS
    positions_after_padding: bool = False  # the first position is the padding id plus one
    pooler_dropout: bool = False  # also on the input of the pooler
    pooler_activation: object = torch.tanh


FAMILIES = {
    "bert": Family(
        "Bert",
        heads={
            "bert.pooler.dense": "pooler",
            "cls.predictions.transform.dense": "mlm_head.dense",
            "cls.predictions.transform.LayerNorm": "mlm_head.norm",
            "cls.predictions": "mlm_head",
            "cls.predictions.decoder": "mlm_head.decoder",
            "classifier": "classifier",
        },
    ),
    "roberta": Family(
        "Roberta",
        heads={
            "classifier.dense": "pooler",
            "lm_head.dense": "mlm_head.dense",
            "lm_head.layer_norm": "mlm_head.norm",
            "lm_head": "mlm_head",
            "lm_head.decoder": "mlm_head.decoder",
            "classifier.out_proj": "classifier",
        },
        defaults={"pad_token_id": 1},
        vocabulary="roberta",
        positions_after_padding=True,
        pooler_dropout=True,
    ),
}
