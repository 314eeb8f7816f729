"""BERT (Devlin et al. 2019) written out by hand, with a coefficient on every attention head and every FFN neuron.

The encoder is the published one: token, position and segment embeddings, post-norm blocks, exact GELU, a pooler, an
MLM head tied to the token embeddings and a classifier head; its numbers equal those of `transformers`. RoBERTa (Liu
et al. 2019) differs in its first position, a dropout and its tensors' names. Two things are added for ORTicket:
`gates`, which scale heads and neurons (eq. 3 and 4 of the paper), and `pruned`, which cuts them away for good and
leaves layers of uneven width.

Not here: decoding, cross attention, next-sentence prediction, relative positions, activations other than GELU.

Shapes: B examples, T tokens, d hidden size, H heads, s = d / H the size of a head, F neurons, V vocabulary.
"""

import math
import os
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from checkpoints import huggingface, safetensors
from runtime.cli import BadInput
from runtime.cpu import Dropout, keep_dropout_masks, linear


@dataclass(frozen=True)
class Config:
    """The sizes of a BERT, by the names of its published config.json, and what pruning left of each layer."""

    model_type: str = "bert"  # or "roberta"
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
    tie_word_embeddings: bool = True  # the MLM head multiplies by the token embeddings; else by a matrix of its own
    num_labels: int = 0  # of the classifier head; 0: no such head
    heads: tuple | None = None  # heads kept in each layer; None: all
    neurons: tuple | None = None  # neurons kept in each layer; None: all

    @property
    def head_size(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def is_pruned(self):
        narrow = min(self.heads or (math.inf,)) < self.num_attention_heads
        return narrow or min(self.neurons or (math.inf,)) < self.intermediate_size

    @property
    def first_position(self):
        """RoBERTa counts its tokens from the padding's number plus one."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def max_length(self):
        """Tokens that a text may have."""
        return self.max_position_embeddings - self.first_position

    @staticmethod
    def read(path):
        """The Config of the model at `path`, its folder or a file of its weights. Raises BadInput where it is not a
        BERT or RoBERTa that this file can run."""
        not_sizes = ("model_type", "num_labels", "heads", "neurons")
        sizes = {f.name: f.type for f in fields(Config) if f.name not in not_sizes}
        config = Config(**huggingface.read_config(path, sizes))
        if config.hidden_size % config.num_attention_heads:
            raise BadInput(f"{path}: hidden_size {config.hidden_size} is no multiple of num_attention_heads")
        if config.max_length < 1:
            raise BadInput(f"{path}: max_position_embeddings {config.max_position_embeddings} leaves no position")
        return config


class Linear(nn.Linear):
    """nn.Linear by `linear`, that leaves its initialization to Bert.initialize."""

    def reset_parameters(self):
        pass

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """Likewise."""

    reset_parameters = Linear.reset_parameters


CLS_ONLY = "the first token of every example"  # in place of the indices of tokens whose states are wanted


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

    def attention(self, x, bias, first_only=False):
        """x (B, T, d), bias (B, 1, 1, T), 0 or at padding very negative, or None -> the heads' outputs side by side,
        (B, T, H s); with `first_only` those at the first token alone, (B, 1, H s)."""
        (B, T, _), width = x.shape, self.heads * self.head_size
        if first_only:
            weight, offset = self.query_key_value.weight, self.query_key_value.bias
            q, kv = linear(x[:, :1], weight[:width], offset[:width]), linear(x, weight[width:], offset[width:])
        else:
            q, kv = self.query_key_value(x).split((width, 2 * width), 2)  # (B, T, H s) and (B, T, 2 H s)
        q = q.view(B, q.shape[1], self.heads, self.head_size).transpose(1, 2)  # (B, H, T or 1, s)
        k, v = kv.view(B, T, 2, self.heads, self.head_size).permute(2, 0, 3, 1, 4)  # (B, H, T, s) each
        if x.is_cuda or (q.dtype == torch.float32 and not torch.is_grad_enabled()):
            p = self.attention_dropout.p if self.training else 0.0
            context = F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype), p)
        else:  # on CPU two plain products are faster than SDPA in bfloat16, and in the backward pass
            scores = (q * self.head_size**-0.5) @ k.transpose(2, 3)  # (B, H, T or 1, T)
            if bias is not None:
                scores = scores + bias.to(scores.dtype)
            dtype = torch.float32 if 16 <= T < 64 else None  # measured: bfloat16's is slower, but for T = 32
            context = self.attention_dropout(scores.softmax(-1, dtype).to(scores.dtype)) @ v
        return context.transpose(1, 2).flatten(2)

    def forward(self, x, bias=None, gates=None, positions=None):
        """x (B, T, d) -> (B, T, d); with `keep`, indices into the B T tokens, (len(keep), d); with FIRST (B, d).

        `gates`: the layer's coefficients (c_H (H,), c_F (F,)). They belong on the heads' outputs and on the neurons
        (eq. 3 and 4); here they scale the columns of the matrix that comes next, which is the same product and
        costs d rather than B T multiplications a column.
        """
        context = self.attention(x, bias, first_only=positions is CLS_ONLY)
        if positions is CLS_ONLY:
            context, x = context[:, 0], x[:, 0]
        elif positions is not None:
            context, x = context.flatten(0, 1)[positions], x.flatten(0, 1)[positions]
        w_o, w_2 = self.attention_output.weight, self.output.weight  # (d, H s) and (d, F)
        if gates is not None:
            w_o = w_o * gates[0].repeat_interleave(self.head_size)
            w_2 = w_2 * gates[1]
        attended = linear(context, w_o, self.attention_output.bias)
        x = self.attention_norm(x + self.dropout(attended))
        activation = F.gelu(self.intermediate(x))
        return self.output_norm(x + self.dropout(linear(activation, w_2, self.output.bias)))


class Bert(nn.Module):
    """The encoder, with an MLM head where `mlm`, with a pooler and a classifier where the configuration has labels."""

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
        self.mlm_head = MLMHead(config) if mlm else None
        self.pooler = Linear(d, d) if config.num_labels else None
        self.classifier = Linear(d, config.num_labels) if config.num_labels else None
        self.checkpointing = False
        self.apply(self.initialize)

    def initialize(self, module):
        """BERT's own initialization: normal with initializer_range, zero biases, LayerNorms that only normalize."""
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            return
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0, self.config.initializer_range)
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        if isinstance(module, (nn.Linear, MLMHead)) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids, mask=None, segments=None, positions=None, gates=None, delta=None):
        """The last layer's hidden states.

        ids: (B, T) token ids. mask: (B, T), true at tokens and false at padding; None: no padding. segments: (B, T)
        of 0 and 1; None: all 0. keep: indices into the B T tokens whose states are wanted, or FIRST; the last layer
        computes no others. gates: (c_H (layers, H), c_F (layers, F)). delta: (B, T, d), added to the token embeddings,
        the perturbation of eq. 6. Returns (B, T, d), with indices (len(keep), d), with FIRST (B, d).
        """
        return self.encode(self.embed(ids, segments, delta), mask, positions, gates)

    def embed(self, ids, segments=None, delta=None):
        """(B, T) -> (B, T, d), what the first layer sees."""
        words = self.word_embeddings(ids)
        if delta is not None:
            words = words + delta
        segments = self.segment_embeddings.weight[0] if segments is None else self.segment_embeddings(segments)
        places = self.position_embeddings.weight[self.config.first_position :][: ids.shape[1]]
        return self.dropout(self.embedding_norm(words + places + segments))

    def encode(self, x, mask=None, positions=None, gates=None):
        """The layers one after another; x (B, T, d), the rest as of `forward`. With `self.checkpointing` a layer keeps
        its input alone and is computed again in the backward pass: a third more work, a fraction of the memory."""
        bias = None
        if mask is not None:
            hidden = torch.finfo(torch.bfloat16).min  # finite, so that a row of padding alone is no NaN
            bias = torch.zeros(mask.shape, device=x.device).masked_fill_(~mask.bool(), hidden)[:, None, None]
        for i, layer in enumerate(self.layers):
            c = None if gates is None else (gates[0][i], gates[1][i])
            given = x, bias, c, positions if i == len(self.layers) - 1 else None
            if self.checkpointing:
                with keep_dropout_masks(None):  # drawn again, as the rest is computed again
                    x = checkpoint(layer, *given, use_reentrant=False)
            else:
                x = layer(*given)
        return x

    def mlm_logits(self, states):
        """states (n, d) of the positions asked for -> (n, V)."""
        return linear(self.mlm_head(states), self.decoder, self.mlm_head.bias)

    @property
    def decoder(self):
        """The matrix (V, d) before the MLM head's softmax."""
        return (self.mlm_head.decoder or self.word_embeddings).weight

    def mlm_loss(self, states, labels):
        """The mean cross entropy of `mlm_logits(states)` against labels (n,), in float32 whatever the autocast.

        On a CPU the softmax takes 32 rows of V at a time: they stay in its cache, where all of them would not.
        """
        products = linear(self.mlm_head(states), self.decoder)  # (n, V)
        size = max(1, len(labels)) if products.is_cuda else 32
        losses = [
            F.cross_entropy(rows.float() + self.mlm_head.bias, wanted, reduction="sum")
            for rows, wanted in zip(products.split(size), labels.split(size))
        ]
        return torch.stack(losses).sum() / max(1, len(labels))

    def class_logits(self, ids, mask=None, segments=None, gates=None, delta=None):
        """(B, T) -> (B, labels), from the pooled state of the first token; arguments as `forward`."""
        return self.classify(self(ids, mask, segments, CLS_ONLY, gates, delta))

    def class_loss(self, ids, mask, segments, labels, gates=None, delta=None):
        """The mean cross entropy of `class_logits` against labels (B,), in float32 whatever the autocast."""
        return F.cross_entropy(self.class_logits(ids, mask, segments, gates, delta).float(), labels)

    def classify(self, states):
        """The last states of the first tokens (B, d) -> (B, labels)."""
        if self.config.model_type == "roberta":
            states = self.dropout(states)
        pooled = torch.tanh(self.pooler(states))
        return self.classifier(self.dropout(pooled))

    def pruned(self, head_mask, ffn_mask):
        """A smaller Bert without the heads and neurons that the masks, (layers, H) and (layers, F) bool, call false.

        Equal to this model with those gates at 0. Only a full model can be pruned. A layer may lose every neuron,
        its FFN is then its output bias alone.
        """
        config = replace(self.config, heads=tuple(head_mask.sum(1).tolist()), neurons=tuple(ffn_mask.sum(1).tolist()))
        state = self.state_dict()
        for name, kept, dimension in pruning_slices(head_mask, ffn_mask, config.head_size):
            state[name] = state[name].index_select(dimension, kept.nonzero().flatten().to(state[name].device))
        return self.with_state(config, state)

    def dense(self, head_mask, ffn_mask):
        """The full-sized Bert that equals this one, which `pruned` made with these masks: zeros where that cut."""
        state = self.state_dict()
        for name, kept, dimension in pruning_slices(head_mask, ffn_mask, self.config.head_size):
            tensor, shape = state[name], list(state[name].shape)
            shape[dimension] = len(kept)
            kept = kept.nonzero().flatten().to(tensor.device)
            state[name] = tensor.new_zeros(shape).index_copy(dimension, kept, tensor)
        return self.with_state(replace(self.config, heads=None, neurons=None), state)

    def with_state(self, config, state):
        """A Bert of another configuration with these tensors."""
        with torch.device("meta"):
            model = Bert(config, mlm=self.mlm_head is not None)
        model.load_state_dict(state, assign=True)
        return model

    def save(self, folder, labels, metadata):
        """Write config.json (the published names, `labels` the classes' names) and model.safetensors, with published
        tensor names and the JSON values `notes`, how it was made, in its header."""
        huggingface.write_config(folder, asdict(self.config), labels)
        tensors = huggingface.to_huggingface(self.state_dict(), self.config.model_type)
        safetensors.write_safetensors(os.path.join(folder, "model.safetensors"), tensors, metadata)

    @staticmethod
    def load(path, mlm=False, num_labels=None):
        """The model at `path`, as published or as `save` wrote it; the widths of its layers are the tensors' own.

        path: its folder, or a file of its weights. mlm: with an MLM head. num_labels: with a classifier of so many
        classes; None: as at `path`. What is wanted and not there, or is a classifier of another size, is newly
        initialized: `model.initialized` names it. `model.unused` names the tensors that bert.py has no use for.
        The parameters are views of the file where that can be: it must not change while the model is in use.
        Raises BadInput that names the tensor which is missing or has another shape than the configuration says.
        """
        config = Config.read(path)
        mapped = huggingface.read_weights(path)
        tensors, unused = huggingface.from_huggingface(mapped, config.model_type, config.num_hidden_layers, path)
        mapped.release()  # what was copied
        heads, neurons = huggingface.layer_widths(tensors, config, path)
        found_labels = len(tensors.get("classifier.bias", ()))
        if num_labels not in (None, found_labels):
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
        num_labels = found_labels if num_labels is None else num_labels
        config = replace(config, heads=heads, neurons=neurons, num_labels=num_labels)
        with torch.device("meta"):  # shapes without memory: a configuration that lies cannot fill the machine
            model = Bert(config, mlm)
        expected = {name: parameter.shape for name, parameter in model.state_dict().items()}
        model.initialized = huggingface.missing_modules(tensors, expected, path)
        model.unused = unused
        for name in model.initialized:
            tensors = {key: tensor for key, tensor in tensors.items() if key.split(".")[0] != name}
            model.get_submodule(name).to_empty(device="cpu").apply(model.initialize)
        tensors = {name: tensors[name].contiguous() for name in expected if name in tensors}
        model.load_state_dict(tensors, strict=False, assign=True)
        return model


def pruning_slices(head_mask, ffn_mask, head_size):
    """(name of a tensor, mask of what is kept, in which dimension) of all that pruning by these masks cuts."""
    for i, (heads, neurons) in enumerate(zip(head_mask, ffn_mask)):
        columns = heads.repeat_interleave(head_size)  # (H s,)
        for kind in ("weight", "bias"):
            yield f"layers.{i}.query_key_value.{kind}", columns.repeat(3), 0
            yield f"layers.{i}.intermediate.{kind}", neurons, 0
        yield f"layers.{i}.attention_output.weight", columns, 1
        yield f"layers.{i}.output.weight", neurons, 1


class MLMHead(nn.Module):
    """What stands between the last hidden state and the product with the token embeddings; `bias` comes after it."""

    def __init__(self, config):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        tied = config.tie_word_embeddings
        self.decoder = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states):
        return self.norm(F.gelu(self.dense(states)))
