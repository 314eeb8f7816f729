"""InfoBERT (Wang et al. 2021): adversarial fine-tuning with two regularizers from information theory.

Let X_i be the n tokens, T_i their embeddings, Z the sentence vector and Y the label. The objective of the paper is

    max  I(Y; T)  -  n beta sum_i I(X_i; T_i)  +  alpha sum_j I(T_kj; Z)

- I(Y; T) is bounded by the loss of the task.
- The information bottleneck, the second term (section 3.2 of the paper), is bounded from above by the distances between
  embeddings: `bottleneck`.
- The third term (section 3.3) anchors the sentence vector to the locally robust tokens k_j. InfoNCE bounds it from
  below: `Anchor`. Tokens are robust if their gradient is neither small, as for irrelevant tokens, nor among the
  largest, as for tokens that an attack changes first: `robust_tokens`.

docs/decisions.md says which version of the authors' code this follows.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from bert import CLS_ONLY


def bottleneck(embeddings, token_mask):
    """An upper bound of sum_i I(X_i; T_i), up to a constant: the mean over tokens of 1/2 |T_i - T_j|^2, j random. This
    is CLUB (Cheng et al. 2020) for unit variances. Its positive term is 0.

    embeddings: (B, T, d). token_mask: (B, T).
    """
    tokens = embeddings[token_mask.bool()].float()  # (N, d)
    others = tokens[torch.randint(len(tokens), (len(tokens),), device=tokens.device)]
    return ((tokens - others) ** 2).sum(1).mean() / 2


def robust_tokens(gradient, token_mask, low=0.5, high=0.9):
    """(rows, columns) of the locally robust tokens: the ranks ceil(low n) to ceil(high n) of the n tokens of a text, by
    the norm of the loss's gradient at their embedding. gradient: (B, T, d). token_mask: (B, T)."""
    norms = gradient.norm(dim=2).masked_fill(~token_mask.bool(), math.inf)  # (B, T), padding last
    rank = norms.argsort(1).argsort(1)
    n = token_mask.sum(1, keepdim=True)  # (B, 1)
    first, end = ((n * share - 1e-4).ceil() for share in (low, high))  # 1e-4: in float32, 0.3 x 10 is more than 3
    return ((rank >= first) & (rank < end)).nonzero(as_tuple=True)


class Anchor(nn.Module):
    """InfoNCE (van den Oord et al. 2018): a lower bound of I(T_k; Z) with a learned score f(T_k, Z) > 0."""

    def __init__(self, dim, width=300):
        super().__init__()
        self.of_token, self.of_sentence = nn.Linear(dim, width), nn.Linear(dim, width, bias=False)
        self.score = nn.Linear(width, 1)

    def forward(self, tokens, sentences):
        """tokens (N, d), the sentence of each (N, d) -> the bound: the mean score of matching pairs, minus the mean
        over sentences of log mean exp of the scores with every token."""
        hidden = F.relu(self.of_token(tokens) + self.of_sentence(sentences)[:, None])  # (sentences, tokens, width)
        scores = F.softplus(self.score(hidden).squeeze(2).float())  # (N, N)
        return scores.diagonal().mean() - (scores.logsumexp(1).mean() - math.log(len(tokens)))


class InfoBERT:
    """The two losses of a training step, as `freelb.freelb` takes them."""

    def __init__(self, model, anchor, alpha, beta, batch_size):
        self.model, self.anchor, self.alpha, self.beta, self.batch_size = model, anchor, alpha, beta, batch_size
        for layer in model.layers:
            layer.attention_dropout.p = 0.0

    def losses(self, ids, mask, segments, labels, share=1):
        """(loss_of(delta), extra_loss(gradient at delta)) of some rows. The second uses the states that the first
        computed. share: of these rows in the batch, a factor of both losses."""
        token_mask = torch.ones_like(ids) if mask is None else mask
        seen = {}

        def loss_of(delta):
            embeddings = self.model.embed(ids, segments, delta)
            seen["tokens"], seen["sentences"] = embeddings, self.model.encode(embeddings, mask, CLS_ONLY)
            loss = F.cross_entropy(self.model.classify(seen["sentences"]).float(), labels)
            return (loss + self.beta * bottleneck(embeddings, token_mask)) * share

        def extra_loss(gradient):
            rows, columns = robust_tokens(gradient, token_mask)
            order = torch.randperm(len(rows), device=rows.device)
            parts = [(rows[part], columns[part]) for part in order.split(self.batch_size)]  # as in the authors' code
            bounds = [self.anchor(seen["tokens"][row, column], seen["sentences"][row]) for row, column in parts]
            return -self.alpha * torch.stack(bounds).mean() * share

        return loss_of, extra_loss
