"""Losses of single rows for private training of the causal language model."""

import math

from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.privacy.row_losses import RowLosses
from keras_vaultgemma.training.loss import cross_entropy, head_terms
from keras_vaultgemma.training.next_token import label_weights
from keras_vaultgemma.training.scoring import token_losses

MICROBATCH_TOKENS = 1024
"""Tokens of the rows that private training computes together, of narrow models twice as many."""

NARROW = 512
"""Width below which the operations of a model take less time than starting them."""

MICROBATCH_NUMBERS = 2**26
"""Largest number of elements that the gradients of these rows have together, 256 MiB in float32."""


class NextTokenRowLosses(RowLosses):
    """Losses of single rows with the default loss of a causal language model.

    A row's loss is the mean over its tokens that count, each times its weight; a user's loss is the
    mean over the rows that have such a token.
    """

    @property
    def takes_row_variables(self):
        """True if all trained variables are the backbone's, without an adapter of the embedding."""
        backbone = self.model.backbone
        if backbone.token_embedding.lora_enabled:
            return False
        known = {id(v) for v in backbone.variables}
        return all(id(v) in known for v in self.model.trainable_variables)

    @property
    def takes_user_variables(self):
        """True if `takes_row_variables`."""
        return self.takes_row_variables

    @property
    def takes_any_number(self):
        """True if the rows share a table of embeddings."""
        return not self.model.backbone.token_embedding.table.trainable

    def rows_at_once(self, rows):
        copied = sum(math.prod(v.shape) for v in self.model.trainable_variables)
        tokens = MICROBATCH_TOKENS * (1 if self.model.backbone.hidden_dim >= NARROW else 2)
        most = tokens // rows[0]["token_ids"].shape[1]
        most = max(1, min(most, MICROBATCH_NUMBERS // max(1, copied)))
        if self.model.backbone.token_embedding.table.trainable:
            return backend.rows_with_own_weights(most)
        return most

    def unit(self, rows, unit):
        return f"one {unit} of at most {rows[0]['token_ids'].shape[1]} tokens"

    def losses(self, x, y=None, sample_weight=None):
        return self.user_losses(ops.ones((ops.shape(y)[0], 1), "bool"), x, y, sample_weight)

    def user_losses(self, is_drawn, x, y=None, sample_weight=None):
        users, sample_weight = ops.shape(is_drawn)[0], label_weights(x, y, sample_weight)
        weights = ops.cast(ops.reshape(is_drawn, (-1, 1)), "float32")
        if sample_weight is not None:
            sample_weight = ops.cast(sample_weight, "float32")
            weights = weights * ops.reshape(sample_weight, (ops.shape(y)[0], -1))
        weights = ops.broadcast_to(weights, ops.shape(y))
        tokens = ops.sum(ops.cast(weights > 0, "float32"), axis=1, keepdims=True)
        rows = ops.sum(ops.cast(ops.reshape(tokens, (users, -1)) > 0, "float32"), axis=1)
        weights = weights / ops.maximum(tokens, 1.0)
        weights = ops.reshape(weights, (users, -1)) / ops.maximum(rows, 1.0)[:, None]
        total, losses = self._token_losses(self.model.hidden_states(x, training=True), y, weights)
        return total, ops.sum(ops.reshape(losses, ops.shape(weights)) * weights, axis=1)

    def _token_losses(self, hidden_states, y, weights):
        """Return the total and the losses of all tokens, of which `weights` are `[U, k * T]`."""
        embedding = self.model.backbone.token_embedding
        table = backend.value_of(embedding.table)
        if len(table.shape) == 2:
            y, weights = ops.reshape(y, (-1,)), ops.reshape(weights, (-1,))
            return token_losses(embedding, hidden_states, y, weights, with_gradient=True)[:2]
        users = table.shape[0]
        rows = ops.reshape(hidden_states, (users, -1, hidden_states.shape[-1]))
        of_users = zip(
            *map(ops.unstack, (rows, table, ops.reshape(y, (users, -1)), weights)), strict=True
        )
        found = [
            cross_entropy(head_terms(embedding, rows, table), y, weights, embedding.logit_soft_cap)
            for rows, table, y, weights in of_users
        ]
        return sum(total for total, *_ in found), ops.stack([losses for _, losses, _ in found])
