# %% [markdown]
# # QLoRA: an adapter on a base in four bits
#
# The weights of VaultGemma 1B take 4.2 GB in float32 and 0.55 GB in int4. An adapter trains on such
# a base as on any other; its own weights are float32. Here the same is done with the bundled model,
# which learns to write a ship's log.
#
# It takes about a minute on two CPU cores.

# %%
import keras

from keras_vaultgemma import VaultGemmaCausalLM, convert, lora

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Texts
#
# The last twenty are held out.

# %%
WINDS, STATES = ["north", "east", "south", "west"], ["calm", "rough", "high"]
texts = [
    f"Day {i}. Wind from the {WINDS[i % 4]}, {3 + i % 11} knots. The sea is {STATES[i % 3]}."
    for i in range(140)
]
texts, held_out = texts[:120], texts[120:]


def megabytes(model):
    """Return the size of a model's weights."""
    return sum(keras.ops.convert_to_numpy(w).nbytes for w in model.weights) / 1e6


def nats(model):
    """Return the mean of -log p of a held-out token."""
    scores = model.score(held_out)  # 0 where nothing is predicted
    return scores.sum() / (scores > 0).sum()


# %% [markdown]
# ## Quantize
#
# `block_size` is the size of the groups that share a scale. Smaller groups are closer to the
# original and take a little more memory. The default, `model.quantize("int4")`, is 128.

# %%
model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
print(f"float32: {megabytes(model):.1f} MB, {nats(model):.3f} nats a token")
groups = keras.quantizers.Int4QuantizationConfig(block_size=32)
model.quantize(config=groups)
print(f"int4:    {megabytes(model):.1f} MB, {nats(model):.3f} nats a token")

# %% [markdown]
# ## Train
#
# Only the adapter trains. The matrices become floating point where they are used, one at a time, so
# int4 saves memory and no time.

# %%
model.preprocessor.sequence_length = 48
projections = ["query", "key", "value", "attention_output", "gate", "up", "down"]
model.backbone.enable_lora(rank=8, target_layer_names=projections, alpha=16, dropout=0.05)
model.compile(optimizer=keras.optimizers.Adam(3e-3))
model.fit(texts, batch_size=12, epochs=4, verbose=2)
print(f"trained: {nats(model):.3f} nats a token")
text = model.generate("Day 141. Wind from the", max_new_tokens=24)
print(text)

# %% [markdown]
# ## Save the adapter, and load it again
#
# The adapter is all that has to be kept. On a base that is quantized in the same way the model is
# the same.

# %%
lora.save_adapter(model, "log_adapter")
again = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
again.quantize(config=groups)
lora.load_adapter(again, "log_adapter")
assert again.generate("Day 141. Wind from the", max_new_tokens=24) == text

# %% [markdown]
# ## Merge it into the base in floating point
#
# To merge into int4 would round a second time. `convert` merges into the original weights instead,
# which are not quite those that the adapter was trained on.

# %%
convert("log_adapter", "log_model")
merged = VaultGemmaCausalLM.from_preset("log_model")
print(f"merged:  {megabytes(merged):.1f} MB, {nats(merged):.3f} nats a token")
