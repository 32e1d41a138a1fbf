"""The VaultGemma backbone: token ids to hidden states, in ONE walk over the layers.

What differs from Gemma 2 (keras-hub's `GemmaBackbone`, transformers' `Gemma2Model`):
- no norm after attention and none after the MLP;
- every layer of the 1B release attends to the whole context; sliding layers are there for `layer_types` that ask;
- the soft caps on attention scores and on logits are options, and the 1B release has neither;
- 1,024 positions; as many key-value heads as query heads (4); attention is 1,024 wide in a 1,152 wide model.
The rest is Gemma's: embeddings tied to the head and scaled by sqrt(D), RMSNorm with 1 + scale, rotary positions, GeGLU.
"""

import math
import warnings

import keras
import keras_hub

from keras_vaultgemma import backend
from keras_vaultgemma._files import new_folder, read_json
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.config import read_config
from keras_vaultgemma.checkpoints.reader import KerasOnly, open_values, warn_if_not_finite
from keras_vaultgemma.layers import kv_cache
from keras_vaultgemma.layers.attention import VaultGemmaAttention, causal_mask, segment_positions
from keras_vaultgemma.layers.decoder_block import VaultGemmaDecoderBlock
from keras_vaultgemma.layers.hyperparameters import check_hyperparameters, is_count
from keras_vaultgemma.layers.initializers import Initial
from keras_vaultgemma.layers.reversible_embedding import ReversibleEmbedding
from keras_vaultgemma.layers.rms_norm import RMSNorm
from keras_vaultgemma.layers.rotary import RotaryAngles
from keras_vaultgemma.lora import adapters
from keras_vaultgemma.models.sharding import layout_map
from keras_vaultgemma.privacy.ledger import preset_ledger
from keras_vaultgemma.privacy.ledger_writer import PrivacyRecord


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class VaultGemmaBackbone(keras_hub.models.Backbone):
    """VaultGemma without its head: `{"token_ids", "padding_mask"}`, int32 [B, T] each, to hidden states [B, T, D].

    `padding_mask` is 1 at tokens and 0 at padding, on either side of the tokens. Rows that several documents share have
    the number of the token's segment instead of 1 (packing.py): positions start anew in each segment, and its tokens
    see no other. Hidden states at padding are finite and mean nothing.

    Args:
        vocabulary_size: V.
        num_layers: L.
        num_query_heads: N.
        num_key_value_heads: K, a divisor of N.
        hidden_dim: D.
        intermediate_dim: F, the width of ONE branch of the gated MLP (keras-hub's Gemma counts both together).
        head_dim: H, even; independent of D.
        query_pre_attn_scalar: attention scores are divided by its square root. Defaults to `head_dim`.
        attention_logit_soft_cap: cap on attention scores, or None.
        final_logit_soft_cap: cap on the logits, or None; applied by the embedding called in reverse.
        layer_types: "full_attention" or "sliding_attention", one for each layer. Defaults to full attention everywhere.
        sliding_window_size: how many positions a sliding layer sees, the query's own included.
        rope_theta: base of the rotary wavelengths.
        layer_norm_epsilon: of every RMSNorm.
        max_sequence_length: positions that the model was trained on. Longer input warns once; it does not fail.
        initializer_range: standard deviation of initial projections and embeddings.
        initial_values: `{variable path: value with read(dtype)}` to start from instead of random values; no part of
            the config. `from_preset` fills variables this way, without drawing gigabytes of numbers first.
        dtype: of compute and weights: a policy name or `keras.DTypePolicy`.

    Raises:
        ValueError: for an argument out of its range, or two that contradict each other.

    References:
        VaultGemma: https://arxiv.org/abs/2510.15001. Gemma 2: https://arxiv.org/abs/2408.00118.
    """

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        num_query_heads,
        num_key_value_heads,
        hidden_dim,
        intermediate_dim,
        head_dim,
        query_pre_attn_scalar=None,
        attention_logit_soft_cap=None,
        final_logit_soft_cap=None,
        layer_types=None,
        sliding_window_size=None,
        rope_theta=10_000.0,
        layer_norm_epsilon=1e-6,
        max_sequence_length=1024,
        initializer_range=0.02,
        initial_values=None,
        dtype=None,
        **kwargs,
    ):
        if unknown := set(kwargs) - {"name", "trainable"}:
            raise ValueError(
                f"VaultGemmaBackbone has no argument {', '.join(map(repr, sorted(unknown)))}"
            )
        if layer_types is None and is_count(num_layers):
            layer_types = ["full_attention"] * num_layers
        arguments = dict(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_key_value_heads=num_key_value_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            head_dim=head_dim,
            query_pre_attn_scalar=head_dim
            if query_pre_attn_scalar is None
            else query_pre_attn_scalar,
            attention_logit_soft_cap=attention_logit_soft_cap,
            final_logit_soft_cap=final_logit_soft_cap,
            layer_types=layer_types,
            sliding_window_size=sliding_window_size,
            rope_theta=rope_theta,
            layer_norm_epsilon=layer_norm_epsilon,
            max_sequence_length=max_sequence_length,
            initializer_range=initializer_range,
        )
        check_hyperparameters(arguments)
        self._hyperparameters = tuple(arguments)
        for name, value in arguments.items():
            setattr(self, name, value)
        self._warned_about_length = False
        self.adapters = adapters.Adapters()
        self.privacy = PrivacyRecord()

        initial = Initial(
            initializer_range, None if initial_values is None else dict(initial_values)
        )
        self.token_embedding = ReversibleEmbedding(
            vocabulary_size,
            hidden_dim,
            embeddings_initializer=initial.below("token_embedding")("embeddings"),
            logit_soft_cap=final_logit_soft_cap,
            dtype=dtype,
            name="token_embedding",
        )
        # It rounds the scale to the compute dtype like every Gemma: 33.94 is 34 in bfloat16.
        self.embedding_scale = keras.layers.Rescaling(
            math.sqrt(hidden_dim), dtype=dtype, name="embedding_scale"
        )
        self.rotary_angles = RotaryAngles(
            head_dim, rope_theta, dtype="float32", name="rotary_angles"
        )
        self.transformer_layers = [
            VaultGemmaDecoderBlock(
                VaultGemmaAttention(
                    num_query_heads,
                    num_key_value_heads,
                    head_dim,
                    self.query_pre_attn_scalar,
                    attention_logit_soft_cap,
                    initial.below(f"decoder_block_{i}").below("attention"),
                    dtype=dtype,
                    name="attention",
                ),
                intermediate_dim,
                layer_type,
                layer_norm_epsilon,
                initial.below(f"decoder_block_{i}"),
                dtype=dtype,
                name=f"decoder_block_{i}",
            )
            for i, layer_type in enumerate(self.layer_types)
        ]
        self.final_norm = RMSNorm(
            layer_norm_epsilon, initial.below("final_norm"), dtype=dtype, name="final_norm"
        )

        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=self.walk(token_ids, segment_positions(padding_mask), segments=padding_mask),
            dtype=dtype,
            **kwargs,
        )
        if initial.values:
            raise ValueError(
                f"`initial_values` has values that no variable takes: {', '.join(sorted(initial.values))}"
            )

    def walk(self, token_ids, positions, cache=None, start=None, segments=None):
        """Embed tokens, pass them through every block and normalise: training, scoring, prefill and decoding alike.

        Prefill on JAX takes the same steps, one program for each block (`prefill.Prefill._read_layer`).

        Args:
            token_ids: int32 [B, T].
            positions: int32 [B, T], of each token in its segment; `cache.EMPTY` at padding.
            cache: `KVCache` of S slots that the tokens are written into and attend to, or None to attend to
                each other only. It is consumed: use the returned one.
            start: int32 scalar, the slot of the first token. Only with a cache.
            segments: int32 [B, T], or [B, S] with a cache: tokens see those of the same number only. None where each
                row is one text.

        Returns:
            Hidden states [B, T, D]; with a cache, a pair of them and the new cache.
        """
        key_positions = (
            positions if cache is None else kv_cache.write(cache.positions, positions, start)
        )
        masks = {
            layer_type: causal_mask(
                positions,
                key_positions,
                self.sliding_window_size if layer_type == "sliding_attention" else None,
                segments,
                start,
            )
            for layer_type in set(self.layer_types)
        }
        angles = self.rotary_angles(positions)
        x = self.embed(token_ids)
        keys, values = [], []
        blocks = (
            self.transformer_layers
            if cache is None
            else backend.trace_once(self.transformer_layers)
        )
        for i, (block, layer_type) in enumerate(zip(blocks, self.layer_types, strict=True)):
            mask = masks[layer_type]
            if cache is None:
                x = block(x, angles=angles, attention_mask=mask)
            else:
                layer_cache = (cache.keys[i], cache.values[i])
                x, (key, value) = block(
                    x, angles=angles, attention_mask=mask, cache=layer_cache, start=start
                )
                keys.append(key)
                values.append(value)
        x = self.final_norm(x)
        return (
            x if cache is None else (x, kv_cache.KVCache(tuple(keys), tuple(values), key_positions))
        )

    def embed(self, token_ids):
        """What the first block reads, [B, T, D], for int32 [B, T]."""
        return self.embedding_scale(self.token_embedding(token_ids))

    @property
    def gradient_checkpointing(self):
        """Whether blocks keep only their input for the backward pass and compute the rest again."""
        return self.transformer_layers[0].gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value):
        for block in self.transformer_layers:
            block.gradient_checkpointing = bool(value)

    def empty_cache(self, batch, slots):
        """A `KVCache` of this model's shape for `batch` rows of `slots` slots."""
        return kv_cache.empty_cache(
            self.num_layers,
            batch,
            slots,
            self.num_key_value_heads,
            self.head_dim,
            self.compute_dtype,
        )

    def call(self, inputs, training=None, mask=None):
        self.warn_if_long(inputs["token_ids"].shape[1])
        return super().call(inputs, training=training, mask=mask)

    def warn_if_long(self, length):
        """Warn, once for this backbone, where `length` positions are more than it was trained on."""
        if length and length > self.max_sequence_length and not self._warned_about_length:
            self._warned_about_length = True
            warnings.warn(
                f"The sequence has {length} positions and the model was trained on {self.max_sequence_length}; "
                "expect worse output beyond them.",
                stacklevel=3,
            )

    def default_lora_layer_names(self):
        return list(adapters.DEFAULT_TARGETS)

    def enable_lora(self, rank, target_layer_names=None, alpha=None, dropout=0.0, name="default"):
        """Freeze the model and train an adapter: `lora.add`, where the arguments are explained."""
        adapters.add(self, rank, target_layer_names, alpha, dropout, name)

    def save_lora_weights(self, filepath):
        raise NotImplementedError(
            "`lora.save_adapter(model, folder)` saves adapters here, in a format that PEFT loads"
        )

    def load_lora_weights(self, filepath):
        raise NotImplementedError(
            "`lora.load_adapter(model, folder)` loads adapters here, and those of PEFT"
        )

    def get_config(self):
        hyperparameters = {name: getattr(self, name) for name in self._hyperparameters}
        return {**super().get_config(), **hyperparameters, "layer_types": list(self.layer_types)}

    def save_to_preset(self, preset_dir, max_shard_size=10):
        """Save into a folder that a `from_preset` of this package or keras-hub loads: whole, or not at all.

        Args:
            preset_dir: made, with the folders above it, where it does not exist.
            max_shard_size: gigabytes of a weights file at most.

        Raises:
            ValueError or OSError: where nothing can be written there.
        """
        with backend.all_gathered(self.variables) as writes:
            if writes:
                with new_folder(preset_dir) as folder, backend.without_tensorflow():
                    super().save_to_preset(str(folder), max_shard_size=max_shard_size)
                    self.privacy.ledger.write(folder)

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Load a backbone from a bundled preset's name, a folder (Keras or Hugging Face format), `hf://` or `kaggle://`.

        Args:
            preset: string or path.
            load_weights: False builds the architecture with random weights.
            **kwargs: constructor arguments that replace the preset's, such as `dtype`.

        Raises:
            ValueError: for an unknown preset, a config this model cannot represent, or weights that do not fit.
            FileNotFoundError: where a preset has no weights to load; it says how to get them.
        """
        folder = presets.find(preset, "weights" if load_weights else "config")
        saved = read_json(folder / presets.CONFIG)["config"] if presets.is_keras(folder) else {}
        values = None
        try:
            if load_weights:
                hyperparameters, values = open_values(folder)
            else:
                hyperparameters = read_config(folder)
        except KerasOnly:
            if saved["dtype"]["class_name"] == "DTypePolicyMap":  # keras-hub would forget it
                kwargs = {"dtype": saved["dtype"], **kwargs}
            with backend.without_tensorflow():
                backbone = super().from_preset(str(folder), load_weights=load_weights, **kwargs)
        else:
            identity = {name: saved[name] for name in ("name", "trainable") if name in saved}
            backbone = cls(**{**hyperparameters, **identity, **kwargs}, initial_values=values)
        if load_weights:
            warn_if_not_finite(backbone, values)
            backbone.privacy.add(preset_ledger(folder, preset, backbone.count_params()))
        return backbone

    @staticmethod
    def get_layout_map(
        device_mesh,
        model_parallel_dim_name="model",
        data_parallel_dim_name="batch",
        preset="vaultgemma_1b",
        **hyperparameters,
    ):
        """How `keras.distribution.ModelParallel` divides a backbone among devices (JAX); distribution.py says how.

        Called before there is a model, since variables are divided when they are made:

        ```python
        mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), keras.distribution.list_devices())
        layout_map = VaultGemmaBackbone.get_layout_map(mesh)
        keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout_map))
        model = VaultGemmaCausalLM.from_preset("vaultgemma_1b")
        ```

        Args:
            device_mesh: `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: the mesh axis along which variables are divided.
            data_parallel_dim_name: the mesh axis along which the rows of a batch are divided.
            preset: whose sizes the devices should divide; as for `from_preset`, and only its config is read.
            **hyperparameters: constructor arguments that replace the preset's.

        Returns:
            `keras.distribution.LayoutMap`. Heads, MLP or vocabulary that the devices do not divide stay whole on each,
            and a warning says so.

        Raises:
            ValueError: for a mesh without these axes, an unknown preset or hyperparameter, or another backend than JAX.
        """
        sizes = read_config(presets.find(preset, "config"))
        if unknown := set(hyperparameters) - set(sizes):
            raise ValueError(
                f"VaultGemmaBackbone has no argument {', '.join(map(repr, sorted(unknown)))}"
            )
        sizes.update(hyperparameters)
        return layout_map(device_mesh, sizes, model_parallel_dim_name, data_parallel_dim_name)
