# %% [markdown]
# # One model, three backends
#
# A Keras preset has no backend. This script generates the same text with JAX, PyTorch and
# TensorFlow, and compares the log-probability of each token. A process has one backend, so each
# gets its own.
#
# It takes about a minute on two CPU cores.

# %%
import json
import os
import subprocess
import sys

PRESET = "vaultgemma_tiny"
PROMPT = "The Fox and the"

# %% [markdown]
# ## What each process runs
#
# `return_log_probs` also returns log p of each new token. Decoding is greedy, so that nothing is
# random.

# %%
PROGRAM = """
import json, sys
from keras_vaultgemma import VaultGemmaCausalLM

model = VaultGemmaCausalLM.from_preset(sys.argv[1])
text, log_probs, _ = model.generate(
    sys.argv[2], max_new_tokens=30, strip_prompt=True, return_log_probs=True
)
print(json.dumps([text, log_probs]))
"""

# %% [markdown]
# ## The backend is an environment variable
#
# In a program of your own, set `os.environ["KERAS_BACKEND"]` before Keras is imported.


# %%
def generate(backend):
    """Return the text and the log-probabilities of its tokens."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, PRESET, PROMPT],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


results = {backend: generate(backend) for backend in ("jax", "torch", "tensorflow")}
for backend, (text, _) in results.items():
    print(f"{backend:>10}: {text!r}")

# %% [markdown]
# ## How equal is equal?
#
# Matrix multiplications add in another order, so the last bits differ. The choice of a token does
# not.

# %%
text, expected = results["jax"]
for backend, (other, log_probs) in results.items():
    assert other == text
    difference = max(abs(a - b) for a, b in zip(log_probs, expected, strict=True))
    print(f"{backend:>10}: log-probabilities within {difference:.1e} of JAX's")
    assert difference < 1e-3
