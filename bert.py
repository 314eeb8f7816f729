"""BERT (Devlin et al. 2019) from scratch, with a coefficient on every attention head and every FFN neuron.

The encoder is the published one: token, position and segment embeddings, post-norm blocks, exact GELU, a pooler, an
MLM head tied to the token embeddings, and a classifier head. Its outputs equal those of `transformers`.
`checkpoints/families.py` lists how RoBERTa and other families differ. ORTicket adds two things: `gates` scale heads
and neurons (eq. 3 and 4), and `pruned` removes them, which leaves layers of different widths.

Not supported: decoding, cross attention, next-sentence prediction, relative positions, activations other than GELU.

Shapes: B examples, T tokens, d hidden size, H heads of size s, N neurons, V vocabulary size. H and N are after pruning.
"""

import os
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from checkpoints import huggingface, safetensors
from checkpoints.families import FAMILIES
from runtime.cli import BadInput
from runtime.cpu import Dropout, linear, redrawn_dropout


@dataclass(frozen=True)
class Config:
    """The sizes of a BERT, named as in its config.json, and the layer widths after pruning."""

    model_type: str = "bert"  # a key of FAMILIES
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # of the full model; a head has hidden_size / num_attention_heads dimensions
    intermediate_size: int = 3072  # of the full model
    max_position_embeddings: int = 512
    type_vocab_size: int = 2  # 0: no segment embeddings
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int = 0
    tie_word_embeddings: bool = True  # the MLM head shares the matrix of the token embeddings
    num_labels: int = 0  # of the classifier head; 0: no classifier
    heads: tuple | None = None  # heads kept in each layer; None: all
    neurons: tuple | None = None  # neurons kept in each layer; None: all

    @property
    def head_size(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def is_pruned(self):
        fewer_heads = self.heads is not None and min(self.heads) < self.num_attention_heads
        return fewer_heads or (self.neurons is not None and min(self.neurons) < self.intermediate_size)

    @property
    def first_position(self):
        return self.pad_token_id + 1 if FAMILIES[self.model_type].positions_after_padding else 0

    @property
    def max_length(self):
        """The maximum number of tokens in a text."""
        return self.max_position_embeddings - self.first_position

    @staticmethod
    def read(path):
        """The Config of the model at `path`, a folder or a file. Raises BadInput if this module cannot run it."""
        not_sizes = ("model_type", "num_labels", "heads", "neurons")
        sizes = {f.name: f.type for f in fields(Config) if f.name not in not_sizes}
        config = Config(**huggingface.read_config(path, sizes))
        if config.hidden_size % config.num_attention_heads:
            raise BadInput(f"{path}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads")
        if config.max_length < 1:
            raise BadInput(f"{path}: max_position_embeddings {config.max_position_embeddings} leaves no position")
        return config


class Linear(nn.Linear):
    """nn.Linear with the faster `linear`. Bert.initialize initializes it."""

    def reset_parameters(self):
        pass

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    reset_parameters = Linear.reset_parameters


CLS_ONLY = object()  # a value of `positions`: compute the last layer only at the first token of each example


class Layer(nn.Module):
    """A post-norm Transformer block with `heads` attention heads and `neurons` FFN neurons. Either may be 0."""

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
        """x (B, T, d) -> the outputs of all heads (B, T, H s), or at the first token only (B, 1, H s).
        bias (B, 1, 1, T): 0 at tokens and very negative at padding; None: no padding."""
        (B, T, _), width = x.shape, self.heads * self.head_size
        if first_only:
            weight, offset = self.query_key_value.weight, self.query_key_value.bias
            q, kv = linear(x[:, :1], weight[:width], offset[:width]), linear(x, weight[width:], offset[width:])
        else:
            q, kv = self.query_key_value(x).split((width, 2 * width), 2)  # (B, T, H s) and (B, T, 2 H s)
        q = q.view(B, q.shape[1], self.heads, self.head_size).transpose(1, 2)  # (B, H, T or 1, s)
        k, v = kv.view(B, T, 2, self.heads, self.head_size).permute(2, 0, 3, 1, 4)  # (B, H, T, s) each
        if x.device.type != "cpu" or (q.dtype == torch.float32 and not torch.is_grad_enabled()):
            p = self.attention_dropout.p if self.training else 0.0
            context = F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype), p)
        else:  # on a CPU, two plain products are faster than SDPA in training and in bfloat16
            scores = (q * self.head_size**-0.5) @ k.transpose(2, 3)  # (B, H, T or 1, T)
            if bias is not None:
                scores = scores + bias.to(scores.dtype)
            dtype = torch.float32 if 16 <= T < 64 else None  # bfloat16 is slower at these lengths
            context = self.attention_dropout(scores.softmax(-1, dtype).to(scores.dtype)) @ v
        return context.transpose(1, 2).flatten(2)

    def forward(self, x, bias=None, gates=None, positions=None):
        """x (B, T, d) -> (B, T, d); with `positions`, n indices into the B T tokens: (n, d); with CLS_ONLY: (B, d).

        gates: the coefficients of the layer (c_H (H,), c_F (N,)). They scale the outputs of the heads (eq. 3) and the
        neurons (eq. 4), by scaling the columns of the next matrix: the same result with fewer multiplications.
        """
        context = self.attention(x, bias, first_only=positions is CLS_ONLY)
        if positions is CLS_ONLY:
            context, x = context[:, 0], x[:, 0]
        elif positions is not None:
            context, x = context.flatten(0, 1)[positions], x.flatten(0, 1)[positions]
        w_o, w_2 = self.attention_output.weight, self.output.weight  # (d, H s) and (d, N)
        if gates is not None:
            w_o = w_o * gates[0].repeat_interleave(self.head_size)  # eq. 3: c_H^h Att^h(x)
            w_2 = w_2 * gates[1]  # eq. 4: GELU(x W_1 + b_1) diag(c_F) W_2 + b_2
        attended = linear(context, w_o, self.attention_output.bias)
        x = self.attention_norm(x + self.dropout(attended))
        activation = F.gelu(self.intermediate(x))
        return self.output_norm(x + self.dropout(linear(activation, w_2, self.output.bias)))


class Bert(nn.Module):
    """The encoder; an MLM head if `mlm`; a pooler and a classifier if the configuration has labels."""

    def __init__(self, config, mlm=False):
        super().__init__()
        self.config, d = config, config.hidden_size
        heads = config.heads or (config.num_attention_heads,) * config.num_hidden_layers
        neurons = config.neurons or (config.intermediate_size,) * config.num_hidden_layers
        self.word_embeddings = Embedding(config.vocab_size, d)
        self.position_embeddings = Embedding(config.max_position_embeddings, d)
        self.segment_embeddings = Embedding(config.type_vocab_size, d) if config.type_vocab_size else None
        self.embedding_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Layer(config, h, n) for h, n in zip(heads, neurons))
        self.mlm_head = MLMHead(config) if mlm else None
        self.pooler = Linear(d, d) if config.num_labels else None
        self.classifier = Linear(d, config.num_labels) if config.num_labels else None
        self.checkpointing = False
        self.apply(self.initialize)

    def initialize(self, module):
        """BERT's initialization: normal weights with std initializer_range, biases 0, LayerNorm weights 1."""
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            return
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0, self.config.initializer_range)
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        if isinstance(module, (nn.Linear, MLMHead)) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids, attention_mask=None, segments=None, positions=None, gates=None, delta=None):
        """The hidden states of the last layer: (B, T, d); with n positions (n, d); with CLS_ONLY (B, d).

        ids: (B, T) token ids. attention_mask: (B, T), True at tokens and False at padding; None: no padding.
        segments: (B, T) of 0 and 1; None: all 0. positions: indices into the B T tokens, or CLS_ONLY: the last layer
        computes only those. gates: (c_H (layers, H), c_F (layers, N)). delta: (B, T, d), the perturbation of eq. 6,
        added to the token embeddings.
        """
        return self.encode(self.embed(ids, segments, delta), attention_mask, positions, gates)

    def embed(self, ids, segments=None, delta=None):
        """(B, T) -> (B, T, d), the input of the first layer."""
        words = self.word_embeddings(ids)
        if delta is not None:
            words = words + delta
        x = words + self.position_embeddings.weight[self.config.first_position :][: ids.shape[1]]
        if self.segment_embeddings is not None:
            x = x + (self.segment_embeddings.weight[0] if segments is None else self.segment_embeddings(segments))
        return self.dropout(self.embedding_norm(x))

    def encode(self, x, attention_mask=None, positions=None, gates=None):
        """Apply the layers to x (B, T, d). The other arguments are those of `forward`.

        With `self.checkpointing` a layer keeps only its input and is recomputed in the backward pass.
        """
        bias = None
        if attention_mask is not None:
            lowest = torch.finfo(torch.bfloat16).min  # finite: a row with only padding gives no NaN
            bias = torch.zeros(attention_mask.shape, device=x.device)
            bias = bias.masked_fill_(~attention_mask.bool(), lowest)[:, None, None]  # (B, 1, 1, T)
        for i, layer in enumerate(self.layers):
            c = None if gates is None else (gates[0][i], gates[1][i])
            inputs = x, bias, c, positions if i == len(self.layers) - 1 else None
            if self.checkpointing:
                with redrawn_dropout():
                    x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return x

    def mlm_logits(self, states):
        """Hidden states (n, d) -> (n, V)."""
        return linear(self.mlm_head(states), self.decoder, self.mlm_head.bias)

    @property
    def decoder(self):
        """The output matrix (V, d) of the MLM head."""
        return (self.word_embeddings if self.mlm_head.decoder is None else self.mlm_head.decoder).weight

    def mlm_loss(self, states, labels):
        """The mean cross entropy of `mlm_logits(states)` and labels (n,), computed in float32 even under autocast."""
        products = linear(self.mlm_head(states), self.decoder)  # (n, V)
        size = max(1, len(labels)) if products.device.type != "cpu" else 32  # on a CPU, few enough to fit in the cache
        losses = [
            F.cross_entropy(rows.float() + self.mlm_head.bias, expected, reduction="sum")
            for rows, expected in zip(products.split(size), labels.split(size))
        ]
        return torch.stack(losses).sum() / max(1, len(labels))

    def class_logits(self, ids, attention_mask=None, segments=None, gates=None, delta=None):
        """(B, T) -> (B, labels), from the pooled state of the first token. The arguments are those of `forward`."""
        return self.classify(self(ids, attention_mask, segments, CLS_ONLY, gates, delta))

    def class_loss(self, ids, attention_mask, segments, labels, gates=None, delta=None):
        """The mean cross entropy of `class_logits` and labels (B,), computed in float32 even under autocast."""
        return F.cross_entropy(self.class_logits(ids, attention_mask, segments, gates, delta).float(), labels)

    def classify(self, states):
        """The states of the first tokens (B, d) -> (B, labels)."""
        family = FAMILIES[self.config.model_type]
        pooled = family.pooler_activation(self.pooler(self.dropout(states) if family.pooler_dropout else states))
        return self.classifier(self.dropout(pooled))

    def pruned(self, head_mask, ffn_mask):
        """A smaller Bert without the heads and neurons whose mask, (layers, H) and (layers, N) bool, is False.

        It equals this model with those gates at 0, and is m * theta_0 of Algorithm 2, line 6. Only a full model can be
        pruned. Load theta_0 again for each ticket: the result shares embeddings and norms with this model. A layer may
        lose all its neurons; its FFN then adds only the output bias.
        """
        config = replace(self.config, heads=tuple(head_mask.sum(1).tolist()), neurons=tuple(ffn_mask.sum(1).tolist()))
        state = self.state_dict()
        for name, kept, dimension in pruning_slices(head_mask, ffn_mask, config.head_size):
            state[name] = state[name].index_select(dimension, kept.nonzero().flatten().to(state[name].device))
        return self.with_state(config, state)

    def dense(self, head_mask, ffn_mask):
        """The inverse of `pruned`: the full-sized Bert with zeros where these masks pruned."""
        state = self.state_dict()
        for name, kept, dimension in pruning_slices(head_mask, ffn_mask, self.config.head_size):
            tensor, shape = state[name], list(state[name].shape)
            shape[dimension] = len(kept)
            kept = kept.nonzero().flatten().to(tensor.device)
            state[name] = tensor.new_zeros(shape).index_copy(dimension, kept, tensor)
        return self.with_state(replace(self.config, heads=None, neurons=None), state)

    def with_state(self, config, state):
        """A Bert with this configuration and the tensors of `state`."""
        with torch.device("meta"):
            model = Bert(config, mlm=self.mlm_head is not None)
        model.load_state_dict(state, assign=True)
        return model

    def save(self, folder, labels, metadata):
        """Write config.json and model.safetensors as in transformers. labels: class names. metadata: provenance."""
        huggingface.write_config(folder, asdict(self.config), labels)
        tensors = huggingface.to_huggingface(self.state_dict(), self.config.model_type)
        safetensors.write_safetensors(os.path.join(folder, "model.safetensors"), tensors, metadata)

    @staticmethod
    def load(path, mlm=False, num_labels=None):
        """Load the model at `path`, a folder or a weights file, as published or as `save` wrote it.

        mlm: with an MLM head. num_labels: classes of the classifier; None: as in the file. A head that is missing, or
        has another number of classes, is initialized and listed in `model.initialized`; `model.unused` lists unused
        tensors. Parameters are memory-mapped: do not change a file in use. Raises BadInput if a tensor does not fit.
        """
        config = Config.read(path)
        mapped = huggingface.read_weights(path)
        tensors, unused = huggingface.from_huggingface(mapped, config.model_type, config.num_hidden_layers, path)
        mapped.release()
        heads, neurons = huggingface.layer_widths(tensors, config, path)
        found_labels = len(tensors.get("classifier.bias", ()))
        num_labels = found_labels if num_labels is None else num_labels
        if num_labels != found_labels:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
        config = replace(config, heads=heads, neurons=neurons, num_labels=num_labels)
        with torch.device("meta"):  # allocates nothing: a wrong configuration cannot exhaust memory
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
    """Yield (name, mask of the kept entries, dimension) for every tensor that pruning with these masks slices."""
    for i, (heads, neurons) in enumerate(zip(head_mask, ffn_mask)):
        columns = heads.repeat_interleave(head_size)  # (H s,)
        for kind in ("weight", "bias"):
            yield f"layers.{i}.query_key_value.{kind}", columns.repeat(3), 0
            yield f"layers.{i}.intermediate.{kind}", neurons, 0
        yield f"layers.{i}.attention_output.weight", columns, 1
        yield f"layers.{i}.output.weight", neurons, 1


class MLMHead(nn.Module):
    """The transform of the hidden states before the product with `Bert.decoder`, and the bias after it."""

    def __init__(self, config):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        tied = config.tie_word_embeddings
        self.decoder = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states):
        return self.norm(F.gelu(self.dense(states)))
