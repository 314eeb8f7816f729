"""BERT (Devlin et al. 2019) written out by hand, with a coefficient on every attention head and every FFN neuron.

The encoder is the published one: token, position and segment embeddings, post-norm blocks, exact GELU, a pooler, an
MLM head tied to the token embeddings and a classifier head; its numbers equal those of `transformers`. Two things
are added for ORTicket: `gates`, which scale heads and neurons (eq. 3 and 4 of the paper), and `pruned`, which
cuts them away for good and leaves layers of uneven width.

Not here: decoding, cross attention, next-sentence prediction, relative positions, activations other than GELU.

Shapes: B examples, T tokens, d hidden size, H heads, s = d / H the size of a head, F neurons, V vocabulary.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn

import weights
from runtime import BadInput, write_json


@dataclass(frozen=True)
class Config:
    """The sizes of a BERT, by the names of its published config.json, and what pruning left of each layer."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # of the full model: hidden_size / num_attention_heads is the size of a head
    intermediate_size: int = 3072  # of the full model
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int = 0
    num_labels: int = 0  # of the classifier head; 0: no such head
    heads: tuple | None = None  # heads kept in each layer; None: all
    neurons: tuple | None = None  # neurons kept in each layer; None: all

    @property
    def head_size(self):
        return self.hidden_size // self.num_attention_heads

    @staticmethod
    def read(path):
        """The Config in the config.json at `path`. Raises BadInput where it is not a BERT that this file can run."""
        try:
            with open(path, encoding="utf8") as file:
                published = dict(json.load(file))
        except FileNotFoundError:
            raise BadInput(f"{path} is not there: a model folder holds config.json beside its weights") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise BadInput(f"{path} is not a model configuration: {error}") from None
        for name, expected in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if published.get(name, expected) != expected:
                raise BadInput(f"{path} has {name} {published[name]!r}; bert.py runs {expected!r}")
        named = {f.name: f.type for f in fields(Config) if f.name not in ("num_labels", "heads", "neurons")}
        config = Config(**{name: published[name] for name in named if name in published})
        for name, kind in named.items():
            value = getattr(config, name)
            least = 0 if kind is float or name == "pad_token_id" else 1
            most = 1 if name.endswith("dropout_prob") else math.inf
            if type(value) not in (int, kind) or not least <= value < most:
                raise BadInput(f"{path}: {name} {value!r} is nothing that a model can have")
        if config.hidden_size % config.num_attention_heads:
            raise BadInput(f"{path}: hidden_size {config.hidden_size} is no multiple of num_attention_heads")
        return config


class Dropout(nn.Module):
    """Inverted dropout. On CPU each 64-bit random word decides for four elements: 5 times faster than nn.Dropout."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.is_cuda:
            return F.dropout(x, self.p)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        draws = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform on -32768 ... 32767
        keep = torch.ge(draws, round(self.p * 65536) - 32768, out=torch.empty_like(x, requires_grad=False))
        return x * keep.mul_(1 / (1 - self.p))


class Linear(nn.Linear):
    """nn.Linear that leaves its initialization to Bert.initialize."""

    def reset_parameters(self):
        pass


class Embedding(nn.Embedding):
    """Likewise."""

    def reset_parameters(self):
        pass


class Layer(nn.Module):
    """One post-norm Transformer block with `heads` attention heads and `neurons` FFN neurons, either may be 0."""

    def __init__(self, config, heads, neurons):
        super().__init__()
        d, width = config.hidden_size, heads * config.head_size
        self.heads, self.head_size = heads, config.head_size
        self.query_key_value = Linear(d, 3 * width)  # one product instead of three
        self.attention_output = Linear(width, d)
        self.attention_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.intermediate = Linear(d, neurons)
        self.output = Linear(neurons, d)
        self.output_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.attention_dropout = Dropout(config.attention_probs_dropout_prob)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def attention(self, x, bias):
        """x (B, T, d), bias (B, 1, 1, T) or None -> the heads' outputs side by side, (B, T, H s)."""
        B, T, _ = x.shape
        qkv = self.query_key_value(x).view(B, T, 3, self.heads, self.head_size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, s) each
        if x.is_cuda:
            p = self.attention_dropout.p if self.training else 0.0
            context = F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype), p)
        else:  # on CPU two plain products are faster than SDPA, above all backward
            scores = (q * self.head_size**-0.5) @ k.transpose(2, 3)  # (B, H, T, T)
            if bias is not None:
                scores = scores + bias.to(scores.dtype)
            context = self.attention_dropout(scores.softmax(-1)) @ v
        return context.transpose(1, 2).reshape(B, T, self.heads * self.head_size)

    def forward(self, x, bias=None, gates=None, keep=None):
        """x (B, T, d) -> (B, T, d), or with `keep`, indices into the B T tokens, -> (len(keep), d).

        `gates`: the layer's coefficients (c_H (H,), c_F (F,)). They belong on the heads' outputs and on the neurons
        (eq. 3 and 4); here they scale the columns of the matrix that comes next, which is the same product and
        costs d rather than B T multiplications a coefficient.
        """
        context = self.attention(x, bias)
        if keep is not None:
            context, x = context.flatten(0, 1)[keep], x.flatten(0, 1)[keep]
        attention_output, output = self.attention_output.weight, self.output.weight  # (d, H s) and (d, F)
        if gates is not None:
            attention_output = attention_output * gates[0].repeat_interleave(self.head_size)
            output = output * gates[1]
        attended = F.linear(context, attention_output, self.attention_output.bias)
        x = self.attention_norm(x + self.dropout(attended))
        activation = F.gelu(self.intermediate(x))
        return self.output_norm(x + self.dropout(F.linear(activation, output, self.output.bias)))


class Bert(nn.Module):
    """The encoder with its pooler, its MLM head where `mlm`, and a classifier head where the config has labels."""

    def __init__(self, config, mlm=False):
        super().__init__()
        self.config, d = config, config.hidden_size
        heads = config.heads or (config.num_attention_heads,) * config.num_hidden_layers
        neurons = config.neurons or (config.intermediate_size,) * config.num_hidden_layers
        self.word_embeddings = Embedding(config.vocab_size, d)
        self.position_embeddings = Embedding(config.max_position_embeddings, d)
        self.segment_embeddings = Embedding(config.type_vocab_size, d)
        self.embedding_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Layer(config, h, n) for h, n in zip(heads, neurons))
        self.pooler = Linear(d, d)
        self.mlm_head = MLMHead(config) if mlm else None
        self.classifier = Linear(d, config.num_labels) if config.num_labels else None
        self.apply(self.initialize)

    def initialize(self, module):
        """BERT's own initialization: normal with initializer_range, zero biases; a LayerNorm is born as it should."""
        if not isinstance(module, (nn.Linear, nn.Embedding)) or module.weight.is_meta:
            return
        module.weight.data.normal_(0, self.config.initializer_range)
        if isinstance(module, nn.Linear):
            module.bias.data.zero_()

    def forward(self, ids, mask=None, segments=None, keep=None, gates=None, delta=None):
        """The last layer's hidden states.

        ids: (B, T) token ids. mask: (B, T), true at tokens and false at padding; None: no padding. segments: (B, T)
        of 0 and 1; None: all 0. keep: indices into the B T tokens whose states are wanted; the last layer computes
        no others. gates: (c_H (layers, H), c_F (layers, F)). delta: (B, T, d), added to the token embeddings, the
        perturbation of eq. 6. Returns (B, T, d), with `keep` (len(keep), d).
        """
        words = self.word_embeddings(ids)
        if delta is not None:
            words = words + delta
        segments = self.segment_embeddings.weight[0] if segments is None else self.segment_embeddings(segments)
        x = words + self.position_embeddings.weight[: ids.shape[1]] + segments  # (B, T, d)
        x = self.dropout(self.embedding_norm(x))
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, device=ids.device).masked_fill_(~mask.bool(), -math.inf)[:, None, None]
            bias.clamp_(min=torch.finfo(torch.bfloat16).min)  # finite, so that a row of padding alone is no NaN
        for i, layer in enumerate(self.layers):
            c = None if gates is None else (gates[0][i], gates[1][i])
            x = layer(x, bias, c, keep if i == len(self.layers) - 1 else None)
        return x

    def mlm_logits(self, states):
        """states (n, d) of the positions asked for -> (n, V)."""
        return F.linear(self.mlm_head(states), self.word_embeddings.weight, self.mlm_head.bias)

    def mlm_loss(self, states, labels):
        """The mean cross entropy of `mlm_logits(states)` against labels (n,), in float32 whatever the autocast.

        The softmax takes 32 rows of V at a time: they stay in the processor's cache, where all of them would not.
        """
        products = F.linear(self.mlm_head(states), self.word_embeddings.weight)  # (n, V)
        losses = [
            F.cross_entropy(rows.float() + self.mlm_head.bias, wanted, reduction="sum")
            for rows, wanted in zip(products.split(32), labels.split(32))
        ]
        return torch.stack(losses).sum() / max(1, len(labels))

    def class_logits(self, ids, mask=None, segments=None, gates=None, delta=None):
        """(B, T) -> (B, labels), from the pooled state of the first token; arguments as `forward`."""
        first = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
        pooled = torch.tanh(self.pooler(self(ids, mask, segments, first, gates, delta)))
        return self.classifier(self.dropout(pooled))

    def pruned(self, head_mask, ffn_mask):
        """A smaller Bert without the heads and neurons that the masks, (layers, H) and (layers, F) bool, call false.

        Equal to this model with those gates at 0. Only a full model can be pruned. A layer may lose every neuron,
        its FFN is then its output bias alone.
        """
        config = replace(self.config, heads=tuple(head_mask.sum(1).tolist()), neurons=tuple(ffn_mask.sum(1).tolist()))
        state = self.state_dict()
        for i, (heads, neurons) in enumerate(zip(head_mask.bool(), ffn_mask.bool())):
            width = heads.repeat_interleave(config.head_size)  # (H s,)
            for name, kept in ((f"layers.{i}.query_key_value", width.repeat(3)), (f"layers.{i}.intermediate", neurons)):
                state[f"{name}.weight"] = state[f"{name}.weight"][kept]
                state[f"{name}.bias"] = state[f"{name}.bias"][kept]
            for name, kept in ((f"layers.{i}.attention_output.weight", width), (f"layers.{i}.output.weight", neurons)):
                state[name] = state[name][:, kept]
        small = Bert(config, mlm=self.mlm_head is not None)
        small.load_state_dict(state)
        return small.to(self.word_embeddings.weight.device)

    def save(self, folder, labels, notes):
        """Write config.json (the published names, `labels` the classes' names) and model.safetensors, with published
        tensor names and the JSON values `notes`, how it was made, in its header."""
        config = {k: v for k, v in asdict(self.config).items() if k not in ("num_labels", "heads", "neurons")}
        config |= {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "hidden_act": "gelu"}
        config |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
        }
        write_json(os.path.join(folder, "config.json"), config)
        tensors = weights.to_published(self.state_dict())
        weights.write_safetensors(os.path.join(folder, "model.safetensors"), tensors, notes)

    @staticmethod
    def load(folder, mlm=False, num_labels=None):
        """The model in `folder`, as published or as `save` wrote it; the widths of its layers are the tensors' own.

        mlm: with an MLM head, newly initialized where the folder has none. num_labels: with a classifier head of so
        many classes, likewise, also where the folder's has another number; None: as in the folder.
        `model.initialized` names what had to be initialized.
        Raises BadInput that names the tensor which is missing or has another shape than the configuration says.
        """
        config = Config.read(os.path.join(folder, "config.json"))
        path = os.path.join(folder, "model.safetensors")
        tensors = weights.from_published(weights.read_safetensors(path)[0], config.num_hidden_layers, path)
        widths = [len(tensors[f"layers.{i}.query_key_value.bias"]) for i in range(config.num_hidden_layers)]
        neurons = [len(tensors[f"layers.{i}.intermediate.bias"]) for i in range(config.num_hidden_layers)]
        full = config.num_attention_heads * config.head_size
        if max(widths) > 3 * full or max(neurons) > config.intermediate_size:
            raise BadInput(f"{path} has layers wider than config.json says: {max(widths) // 3} and {max(neurons)}")
        found_labels = len(tensors.get("classifier.bias", ()))
        if num_labels not in (None, found_labels):
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
        config = replace(
            config,
            heads=tuple(width // (3 * config.head_size) for width in widths),
            neurons=tuple(neurons),
            num_labels=found_labels if num_labels is None else num_labels,
        )
        with torch.device("meta"):  # shapes without memory: a configuration that lies cannot fill the machine
            expected = {name: parameter.shape for name, parameter in Bert(config, mlm).state_dict().items()}
        for name, shape in expected.items():
            if name not in tensors and not name.startswith(("mlm_head.", "classifier.", "pooler.")):
                raise BadInput(f"{path} has no tensor for {name}")
            if name in tensors and tensors[name].shape != shape:
                found = tuple(tensors[name].shape)
                raise BadInput(f"{path}: {name} has shape {found}, config.json says {tuple(shape)}")
        model = Bert(config, mlm)
        model.load_state_dict({name: tensors[name] for name in expected if name in tensors}, strict=False)
        model.initialized = sorted({name.split(".")[0] for name in expected if name not in tensors})
        return model


class MLMHead(nn.Module):
    """What stands between the last hidden state and the product with the token embeddings; `bias` comes after it."""

    def __init__(self, config):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states):
        return self.norm(F.gelu(self.dense(states)))


def count_parameters(config, head_mask=None, ffn_mask=None):
    """How many parameters a Bert of these sizes has, pooler and classifier included, before or after pruning."""
    if head_mask is not None:
        config = replace(config, heads=tuple(head_mask.sum(1).tolist()), neurons=tuple(ffn_mask.sum(1).tolist()))
    with torch.device("meta"):
        return sum(p.numel() for p in Bert(config).parameters())
