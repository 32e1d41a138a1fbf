# %% [markdown]
# # Protect patients, not rows
#
# A hospital has several notes of each patient. If single rows are protected, a patient with ten of
# them is protected ten times less. With `unit="user"` the guarantee is for all notes of a patient
# together.
#
# It takes about a minute on two CPU cores.

# %%
import keras

from keras_vaultgemma import VaultGemmaCausalLM, privacy

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Notes, each with the patient it belongs to
#
# The notes are made up. Patient 0 has forty of them, the others one to four.

# %%
COMPLAINTS = ["a sore throat", "a cough", "back pain", "a headache"]
notes, patients = [], []
for patient in range(200):
    for visit in range(40 if patient == 0 else 1 + patient % 4):
        notes.append(f"Visit {visit + 1}: the patient has {COMPLAINTS[(patient + visit) % 4]}.")
        patients.append(f"patient-{patient}")
print(f"{len(notes)} notes of {len(set(patients))} patients")

# %% [markdown]
# ## The guarantee
#
# Each step samples patients, takes at most two notes of each, and clips the gradient of their mean.
# So patient 0 counts no more than the others, and ε is that of a patient.

# %%
model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
model.preprocessor.sequence_length = 24
model.backbone.enable_lora(rank=4, target_layer_names=["query", "value", "gate", "up", "down"])
guarantee = privacy.DPSGD(epsilon=8.0, delta=1e-4, clip_norm=0.5, unit="user", max_rows_per_group=2)
model.compile(optimizer=keras.optimizers.Adam(1e-2), privacy=guarantee)
model.fit(notes, groups=patients, epochs=8, batch_size=100, verbose=2)
print(model.privacy.spent())

# %% [markdown]
# Losses are called "unprotected", because the noise does not cover them: do not publish them.
# `spent` may be published, and so may the weights. This machine remembers the run, and `keras-
# vaultgemma ledger` adds up all that these patients have spent.

# %% [markdown]
# ## Text
#
# The noise keeps out what a single patient adds. What many share is learned.

# %%
print(model.generate("Visit 1: the patient has", max_new_tokens=12))
