"""Checkpoints to serve, and processes that look for presets on a hub."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import keras_vaultgemma

# Without what the package imports, so that no test has to wait for a Keras backend in a new process.
FIND = """
import json, os, sys, types
package = types.ModuleType("keras_vaultgemma")
package.__path__ = [os.path.dirname(sys.argv[1])]
sys.modules[package.__name__] = package
from keras_vaultgemma.checkpoints import presets
answers = []
for handle in sys.argv[3:]:
    try:
        answers.append({"folder": str(presets.find(handle, sys.argv[2]))})
    except (ValueError, OSError, ImportError) as error:
        answers.append({"error": type(error).__name__, "message": str(error)})
print(json.dumps(answers))
"""

LOAD = """
import json, sys
from keras_vaultgemma import VaultGemmaBackbone
print(json.dumps([w.tolist() for w in VaultGemmaBackbone.from_preset(sys.argv[1]).get_weights()]))
"""


def run(script, *arguments, env):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def find_each(handles, need="weights", *, env):
    """What `presets.find` answers in a process of its own: `{"folder"}` or `{"error", "message"}` for each handle."""
    return run(FIND, keras_vaultgemma.__file__, need, *handles, env=env)


def find(handle, need="weights", *, env):
    return find_each([handle], need, env=env)[0]


def write_checkpoint(folder, seed):
    """A Hugging Face checkpoint of random float32 weights."""
    folder.mkdir(parents=True)
    vocabulary, width, mlp, heads, head_dim = 64, 24, 40, 2, 16
    config = dict(
        model_type="vaultgemma",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        layer_types=["full_attention"],
        max_position_embeddings=32,
    )
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        f"{layer}.input_layernorm.weight": (width,),
        f"{layer}.self_attn.q_proj.weight": (heads * head_dim, width),
        f"{layer}.self_attn.k_proj.weight": (heads * head_dim, width),
        f"{layer}.self_attn.v_proj.weight": (heads * head_dim, width),
        f"{layer}.self_attn.o_proj.weight": (width, heads * head_dim),
        f"{layer}.pre_feedforward_layernorm.weight": (width,),
        f"{layer}.mlp.gate_proj.weight": (mlp, width),
        f"{layer}.mlp.up_proj.weight": (mlp, width),
        f"{layer}.mlp.down_proj.weight": (width, mlp),
        "model.norm.weight": (width,),
    }
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(0, 0.2, shape).astype("float32") for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def content(folder):
    """{path: bytes} of every file in a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()
    }


def assert_same_weights(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
