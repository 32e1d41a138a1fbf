"""Losses of single rows for private training of the causal language model."""

from keras import ops

from keras_vaultgemma.lora.injection import adaptable_layers
from keras_vaultgemma.privacy.train_step import RowLosses
from keras_vaultgemma.training.next_token import label_weights
from keras_vaultgemma.training.scoring import token_losses

MICROBATCH_TOKENS = 1024
"""Tokens of the rows that private training computes together."""


class NextTokenRowLosses(RowLosses):
    """Losses of single rows with the default loss of a causal language model.

    A row's loss is the mean over its tokens that count, each times its weight; a user's loss is the
    mean over the rows that have such a token.
    """

    @property
    def takes_row_variables(self):
        """True if LoRA factors of projections are all that is trained."""
        layers = adaptable_layers(self.model.backbone).values()
        factors = [v for layer in layers if layer.takes_row_factors for v in layer.lora_factors]
        return {id(v) for v in self.model.trainable_variables} <= {id(v) for v in factors}

    @property
    def takes_user_variables(self):
        """True if `takes_row_variables`."""
        return self.takes_row_variables

    def rows_at_once(self, rows):
        return max(1, MICROBATCH_TOKENS // rows[0]["token_ids"].shape[1])

    def unit(self, rows, unit):
        return f"one {unit} of at most {rows[0]['token_ids'].shape[1]} tokens"

    def losses(self, x, y=None, sample_weight=None):
        return self.user_losses(ops.ones((y.shape[0], 1), "bool"), x, y, sample_weight)

    def user_losses(self, is_drawn, x, y=None, sample_weight=None):
        users, sample_weight = is_drawn.shape[0], label_weights(x, y, sample_weight)
        weights = ops.cast(ops.reshape(is_drawn, (-1, 1)), "float32")
        if sample_weight is not None:
            sample_weight = ops.cast(sample_weight, "float32")
            weights = weights * ops.reshape(sample_weight, (y.shape[0], -1))
        weights = ops.broadcast_to(weights, y.shape)
        tokens = ops.sum(ops.cast(weights > 0, "float32"), axis=1, keepdims=True)
        rows = ops.sum(ops.cast(ops.reshape(tokens, (users, -1)) > 0, "float32"), axis=1)
        weights = weights / ops.maximum(tokens, 1.0)
        weights = ops.reshape(weights, (users, -1)) / ops.maximum(rows, 1.0)[:, None]
        total, losses, _ = token_losses(
            self.model.backbone.token_embedding,
            self.model.hidden_states(x, training=True),
            ops.reshape(y, (-1,)),
            ops.reshape(weights, (-1,)),
            with_gradient=True,
        )
        return total, ops.sum(ops.reshape(losses, ops.shape(weights)) * weights, axis=1)
