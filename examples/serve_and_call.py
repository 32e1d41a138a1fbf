# %% [markdown]
# # Serve a model, and call it
#
# `keras-vaultgemma serve` answers the requests of OpenAI's clients (`pip install
# "keras-vaultgemma[serve]" openai`). Here a second process serves the bundled model, and this one
# calls it: once, as a stream, in a chat, and with many questions at a time.
#
# It takes about a minute on two CPU cores.

# %%
import atexit
import json
import re
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai

# %% [markdown]
# ## Start the server
#
# In a shell this is `keras-vaultgemma serve --port 8000`. Port 0 is any free one, and the first
# line that the server prints says which. It listens on this machine alone.

# %%
command = [sys.executable, "-m", "keras_vaultgemma", "serve", "--preset", "vaultgemma_tiny"]
server = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
atexit.register(server.kill)  # should a cell below fail
lines = iter(server.stderr.readline, "")
address = next(found[0] for line in lines if (found := re.search(r"http://[\d.:]+\d", line)))

with urllib.request.urlopen(f"{address}/health") as response:
    print(address, json.load(response))

# %% [markdown]
# ## A completion
#
# At temperature 0 it is what `generate` returns.

# %%
client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
print([model.id for model in client.models.list()])
options = dict(model="vaultgemma_tiny", max_tokens=24)
answer = client.completions.create(prompt="The Fox and the", temperature=0, logprobs=1, **options)
print(answer.choices[0].text)
log_probs = answer.choices[0].logprobs.token_logprobs
print(f"{answer.usage.completion_tokens} tokens, log p of all together {sum(log_probs):.1f}")

# %% [markdown]
# ## A stream
#
# Each piece comes as soon as it is decoded. The server has samplers, too.

# %%
sampling = dict(temperature=0.8, top_p=0.9, seed=7, extra_body={"repetition_penalty": 1.2})
for piece in client.completions.create(prompt="Once", stream=True, **sampling, **options):
    print(piece.choices[0].text, end="|", flush=True)
print()

# %% [markdown]
# ## A chat
#
# The bundled model is pre-trained only, so it goes on telling tales rather than answer.
# Serve your own with `--adapter NAME=FOLDER`; `NAME` is then a model.

# %%
messages = [{"role": "user", "content": "Tell me of the fox."}]
reply = client.chat.completions.create(messages=messages, temperature=0, **options)
print(reply.choices[0].message.content)

# %% [markdown]
# ## Many at a time
#
# Requests that arrive together are decoded together, and each gets the answer that it would get
# alone.

# %%
prompts = [f"The {animal} said" for animal in ("fox", "hare", "tortoise", "lion", "crow", "ant")]


def complete(prompt):
    """Return the greedy continuation of a prompt."""
    answer = client.completions.create(prompt=prompt, temperature=0, **options)
    return answer.choices[0].text


with ThreadPoolExecutor(len(prompts)) as pool:
    together = [*pool.map(complete, prompts)]
assert together == [complete(prompt) for prompt in prompts]
for prompt, text in zip(prompts, together, strict=True):
    print(prompt + text)

# %% [markdown]
# ## End the server

# %%
server.terminate()
server.wait(timeout=60)
print("The server has ended")
