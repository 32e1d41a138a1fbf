# %% [markdown]
# # Private fine-tuning of questions and answers, in four bits
#
# The job of Google's cookbook for VaultGemma: question and answer rows, LoRA on all seven
# projections of a base in 4 bits, a cosine schedule with warm-up, and differential privacy. It ends
# with exports for PEFT, transformers and llama.cpp, and with a page on what the training protects.
# [What the cookbook's own recipe computes](../privacy/cookbook.md) is another page.
#
# It takes about two minutes on two CPU cores with PyTorch and three with JAX or TensorFlow, which
# compile each of the three models that the page compares.

# %%
import random

import keras

from keras_vaultgemma import VaultGemmaCausalLM, compare, convert, lora, privacy

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Private rows, and public ones
#
# The rows are made up. A question is about one patient; an answer says what helps, which is the
# same for all. Read your own with `pandas.read_csv`: `fit` takes tables with such columns. The
# public rows name nobody. They tell how well the model answers, without a look at the private ones.

# %%
ADVICE = {
    "a cough": "honey and hot steam",
    "back pain": "a walk each day",
    "a headache": "water and sleep",
    "a cold": "soup and fresh air",
}


def table(stories):
    """Return a table of questions and answers."""
    complaints = [next(name for name in ADVICE if name in story) for story in stories]
    return {
        "prompt": [f"{story}\nAdvice:" for story in stories],
        "response": [f" {ADVICE[complaint]}." for complaint in complaints],
    }


stories = [
    f"Patient {i} has had {[*ADVICE][i % 4]} for {2 + i // 4 % 7} days."
    for i in random.Random(0).sample(range(1000, 10000), 1600)
]
private_rows, unseen_rows = table(stories[:1500]), table(stories[1500:])
public_rows = table([f"A patient has had {complaint} for 3 days." for complaint in ADVICE])

# %% [markdown]
# ## Train
#
# Each step samples every row with the same probability, as the accountant assumes. Only answers and
# their `<eos>` are trained on. The page compares it with a plain twin, which needs no large batches
# and, with small ones, no more than one epoch.

# %%
TARGETS = ["query", "key", "value", "attention_output", "gate", "up", "down"]


def train(folder, epochs, batch_size, guarantee=None):
    """Train an adapter on a base in 4 bits, save it, and return the model."""
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    model.preprocessor.sequence_length = 32
    model.quantize("int4")
    model.backbone.enable_lora(rank=8, target_layer_names=TARGETS, alpha=16, dropout=0.05)
    steps = epochs * len(private_rows["prompt"]) // batch_size
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - steps // 10, warmup_target=1.5e-2, warmup_steps=steps // 10
    )
    model.compile(keras.optimizers.Adam(schedule), privacy=guarantee)
    model.fit(
        private_rows, validation_data=public_rows, batch_size=batch_size, epochs=epochs, verbose=2
    )
    lora.save_adapter(model, folder)
    return model


train("plain", epochs=1, batch_size=50)
guarantee = privacy.DPSGD(epsilon=8.0, delta=1e-5, clip_norm=0.5, public_validation=True)
model = train("private", epochs=3, batch_size=125, guarantee=guarantee)
print(model.privacy.spent())

# %% [markdown]
# ## Ask
#
# What belongs to one patient was noise to the training. What helps is the same for many, and was
# learned.

# %%
import keras_hub

model.compile(sampler=keras_hub.samplers.TopPSampler(p=0.9, temperature=0.7))
for question in public_rows["prompt"]:
    answer = model.generate(question, max_new_tokens=12, seed=0, repetition_penalty=1.1)
    print(answer.replace("\n", " "))

# %% [markdown]
# ## Export, and the page
#
# "private" is a folder that PEFT loads. The others are complete models, in which the adapter is
# merged into the base in floating point. The page compares the base, the plain twin and the private
# model, on the rows that they were trained on and on unseen ones.

# %%
convert("private", "for_transformers", to="hf")
convert("private", "for_llama_cpp", to="gguf", dtype="f16")
figures = dict(max_records=100, html="report.html")
print(compare("private", private_rows, unseen_rows, plain="plain", **figures))
