# %% [markdown]
# # One training run in two processes
#
# On JAX, a run may be spread over several machines. Here two processes on one machine, with two
# devices each, train one model: its weights are divided between devices, and each process reads its
# own half of the texts.
#
# It takes about a minute on two CPU cores.

# %%
import os
import socket
import subprocess
import sys

# %% [markdown]
# ## What each process runs
#
# `initialize` comes first: it connects the processes. Then the model's layout map says which axis
# of which matrix is divided.

# %%
PROGRAM = """
import keras

keras.distribution.initialize()

from keras_vaultgemma import VaultGemmaBackbone, VaultGemmaCausalLM
import jax

devices = keras.distribution.list_devices()
mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
layout_map = VaultGemmaBackbone.get_layout_map(mesh, preset="vaultgemma_tiny")
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=layout_map, auto_shard_dataset=False)
)

texts = [f"Tale {i}: the tortoise won the race." for i in range(32)]
mine = texts[jax.process_index() :: jax.process_count()]

model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
model.preprocessor.sequence_length = 16
model.backbone.enable_lora(rank=4)
model.compile(optimizer=keras.optimizers.Adam(5e-3))
history = model.fit(mine, batch_size=8, epochs=2, verbose=0).history
print(f"process {jax.process_index()} of {jax.process_count()}, {len(devices)} devices in all, "
      f"losses {[round(x, 4) for x in history['loss']]}")
"""

# %% [markdown]
# ## Start both
#
# Under Slurm and on Cloud TPUs these variables are not needed. XLA's flag makes two devices of one
# CPU, and Gloo carries the messages between CPUs.

# %%
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
environment = {
    **os.environ,
    "KERAS_BACKEND": "jax",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
    "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
}
processes = [
    subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**environment, "KERAS_DISTRIBUTION_PROCESS_ID": str(i)},
        stdout=subprocess.PIPE,
        text=True,
    )
    for i in range(2)
]
outputs = [process.communicate(timeout=600)[0].strip() for process in processes]

# %% [markdown]
# Both report the same losses, because they train the same model.

# %%
print("\n".join(outputs))
assert all(process.returncode == 0 for process in processes)
losses = [output.partition("losses ")[2] for output in outputs]
assert losses[0] and losses[0] == losses[1]
