# %% [markdown]
# # Fine-tune, and give it to others
#
# An adapter teaches the bundled model to answer in one word. It is saved as a folder that PEFT
# loads, merged into a Keras preset, and exported for transformers.
#
# It takes about a minute on two CPU cores.

# %%
import keras

from keras_vaultgemma import VaultGemmaCausalLM, convert, lora

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Questions and answers
#
# `fit` trains on the responses and their `<eos>` alone. What the model is asked is not trained on.

# %%
animals = {"tortoise": "slow", "hare": "fast", "fox": "sly", "lion": "strong", "ant": "busy"}
questions = [f"How is the {name}?" for name in animals]
answers = [f" It is {word}." for word in animals.values()]
pairs = {"prompts": questions * 20, "responses": answers * 20}

# %% [markdown]
# ## An adapter of rank 8
#
# Only the factors of the query and value projections train. `score` says how well the answer is
# predicted.

# %%
model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
model.preprocessor.sequence_length = 32
before = model.generate(questions, max_new_tokens=8, strip_prompt=True)

model.backbone.enable_lora(rank=8, target_layer_names=["query", "value", "gate", "up", "down"])
model.compile(optimizer=keras.optimizers.Adam(5e-3))
model.fit(pairs, batch_size=20, epochs=8, verbose=2)

after = model.generate(questions, max_new_tokens=8, strip_prompt=True)
for question, first, then in zip(questions, before, after, strict=True):
    print(f"{question} before: {first!r}, after: {then!r}")

# %% [markdown]
# ## Save the adapter alone
#
# The folder has some hundred kilobytes. `lora.load_adapter` puts it onto the base again, and so
# does PEFT.

# %%
lora.save_adapter(model, "one_word")

again = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
lora.load_adapter(again, "one_word")
assert again.generate(questions, max_new_tokens=8, strip_prompt=True) == after

# %% [markdown]
# ## A preset, and a folder for transformers
#
# Both are complete models, in which the adapter is merged.
# `keras_hub.upload_preset("hf://you/name", "answers")` publishes the first one, and `hf upload
# you/name answers_hf` the second.

# %%
model.save_to_preset("answers")
convert("answers", "answers_hf", to="hf", verify=True)

restored = VaultGemmaCausalLM.from_preset("answers_hf")
print(restored.generate("How is the fox?", max_new_tokens=8))
