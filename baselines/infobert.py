"""InfoBERT (Wang et al. 2021): adversarial fine-tuning with two regularizers from information theory.

With X_i the n tokens, T_i their embeddings, Z the sentence's vector and Y its label, the objective of the paper is

    max  I(Y; T)  -  n beta sum_i I(X_i; T_i)  +  alpha sum_j I(T_kj; Z)

I(Y; T) is bounded by the task's loss. The information bottleneck (section 3.2 of the paper), the second term, is
bounded from above by how far embeddings lie from one another: `bottleneck`. The third (section 3.3) anchors the
sentence's vector to its locally robust tokens k_j, bounded from below by InfoNCE: `Anchor`. Robust tokens are those
where the adversary's gradient is neither small, as at tokens that do not matter, nor largest, as at those that break
first: `robust_tokens`. As in the authors' code, version 6 of their estimators, embeddings are those after the
LayerNorm and the dropout, the sentence's vector is the last hidden state of [CLS], and alpha, beta = 5e-3.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from bert import CLS_ONLY


def bottleneck(embeddings, present):
    """Upper bound of sum_i I(X_i; T_i), up to a constant: CLUB (Cheng et al. 2020) with unit variances, whose positive
    term is 0. The mean over tokens of 1/2 |T_i - T_j|^2, j drawn anew for each. embeddings: (B, T, d); present: (B, T).
    """
    tokens = embeddings[present.bool()].float()  # (N, d)
    others = tokens[torch.randint(len(tokens), (len(tokens),), device=tokens.device)]
    return ((tokens - others) ** 2).sum(1).mean() / 2


def robust_tokens(gradient, present, low=0.5, high=0.9):
    """(rows, columns) of the locally robust tokens: of a text's n tokens, in rising order of the norm of the loss's
    gradient at their embedding, the ranks from ceil(low n) to ceil(high n). gradient: (B, T, d); present: (B, T)."""
    norms = gradient.norm(dim=2).masked_fill(~present.bool(), math.inf)  # (B, T), padding last
    rank = norms.argsort(1).argsort(1)
    n = present.sum(1, keepdim=True).double()  # in float32, 0.9 times 10 would be more than 9
    return ((rank >= (n * low).ceil()) & (rank < (n * high).ceil())).nonzero(as_tuple=True)


class Anchor(nn.Module):
    """InfoNCE (van den Oord et al. 2018): a lower bound of I(T_k; Z) by a learned score f(T_k, Z) > 0."""

    def __init__(self, dim, width=300):
        super().__init__()
        self.of_token, self.of_sentence = nn.Linear(dim, width), nn.Linear(dim, width, bias=False)
        self.score = nn.Linear(width, 1)

    def forward(self, tokens, sentences):
        """tokens (N, d), the sentence of each (N, d) -> the bound: mean f of those that belong together, less the mean
        log of the mean exp f of each sentence with every token."""
        hidden = F.relu(self.of_token(tokens) + self.of_sentence(sentences)[:, None])  # (sentences, tokens, width)
        scores = F.softplus(self.score(hidden).squeeze(2).float())  # (N, N)
        return scores.diagonal().mean() - (scores.logsumexp(1).mean() - math.log(len(tokens)))


class InfoBERT:
    """The losses of a training step, for `freelb.freelb`: of a batch, and what its gradient at the tokens adds."""

    def __init__(self, model, anchor, alpha, beta, batch_size):
        self.model, self.anchor, self.alpha, self.beta, self.batch_size = model, anchor, alpha, beta, batch_size

    def losses(self, ids, mask, segments, labels, share=1):
        """(loss_of(delta), anchored(gradient at delta)); the second is of the pass that the first has just done.
        share: that of these rows in the batch, a factor of both."""
        present = torch.ones_like(ids) if mask is None else mask
        seen = {}

        def loss_of(delta):
            embeddings = self.model.embed(ids, segments, delta)
            seen["tokens"], seen["sentences"] = embeddings, self.model.encode(embeddings, mask, CLS_ONLY)
            loss = F.cross_entropy(self.model.classify(seen["sentences"]).float(), labels)
            return (loss + self.beta * bottleneck(embeddings, present)) * share

        def extra_loss(gradient):
            rows, columns = robust_tokens(gradient, present)
            order = torch.randperm(len(rows), device=rows.device)  # compared batch_size at a time, as in their code
            bounds = [
                self.anchor(seen["tokens"][rows[part], columns[part]], seen["sentences"][rows[part]])
                for part in order.split(self.batch_size)
            ]
            return -self.alpha * torch.stack(bounds).mean() * share

        return loss_of, extra_loss
