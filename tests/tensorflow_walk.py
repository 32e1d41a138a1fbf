"""Calls everything public in one process, and ends with what has imported TensorFlow, if anything has.

The examples of the docstrings, and what users do with Keras's own functions and with keras-hub. The bundled preset has one
layer here, which takes a third of the time.
"""

import contextlib
import copy
import os
import sys
import tempfile
from pathlib import Path

import keras_vaultgemma


def check(what):
    loaded = [
        name for name in sys.modules if name.partition(".")[0] in ("tensorflow", "tensorflow_text")
    ]
    if loaded:
        sys.exit(f"{what} has imported {loaded[0]}")


check("import keras_vaultgemma")

import keras  # noqa: E402
import keras_hub  # noqa: E402

check("import keras_hub")
keras.utils.set_random_seed(1)
check("set_random_seed")

BY_HAND = """
model = keras_vaultgemma.VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
model.get_config()
model.backbone.get_config()
model.preprocessor.get_config()
keras.layers.serialize(model)
model.to_json()
model.summary(print_fn=lambda line: None)
copy.deepcopy(model.backbone)
model.save("model.keras")
keras.saving.load_model("model.keras")
model.save_weights("model.weights.h5")
model.load_weights("model.weights.h5")
model.get_compile_config()
keras_vaultgemma.lora.add(model, rank=2)
keras_vaultgemma.lora.save_adapter(model, "adapter")
keras_vaultgemma.lora.load_adapter(model, "adapter", name="again")
model.compile(optimizer="adam", sampler="top_k")
model.fit(["Once upon a time"] * 2, batch_size=2, verbose=0)
model.evaluate(["Once upon a time"] * 2, batch_size=2, verbose=0)
model.predict(model.preprocessor(["Once"], sequence_length=4)[0], verbose=0)
model.save_to_preset("preset")
keras_hub.models.CausalLM.from_preset("preset")
keras_hub.models.Backbone.from_preset("preset")
keras_hub.models.Tokenizer.from_preset("preset")
keras_hub.models.CausalLMPreprocessor.from_preset("preset")
quantized = keras_vaultgemma.VaultGemmaCausalLM.from_preset("preset")
quantized.quantize("int8")
quantized.save_to_preset("int8")
keras_vaultgemma.VaultGemmaCausalLM.from_preset("int8").generate("Once", max_new_tokens=2)
"""


def main():
    from common import one_layer_preset
    from public import public_methods, public_objects
    from test_docstring_examples import examples

    from keras_vaultgemma.checkpoints import presets

    folder, bundled = Path(one_layer_preset()), presets.bundled
    presets.bundled = lambda: {**bundled(), "vaultgemma_tiny": folder}
    check("save_to_preset")
    names = dict(copy=copy, keras=keras, keras_hub=keras_hub, keras_vaultgemma=keras_vaultgemma)
    for line in BY_HAND.strip().splitlines():
        exec(line, names)
        check(line)
    for name, value in {**public_objects(), **public_methods()}.items():
        namespace = {"__name__": "__main__"}
        with contextlib.chdir(tempfile.mkdtemp(dir=os.getcwd())):
            for example in examples(value):
                try:
                    exec(compile(example, name, "exec"), namespace)
                except ImportError as error:
                    if "pip install 'keras-vaultgemma[eval]'" not in str(error):
                        raise
                check(name)
    print("nothing has imported TensorFlow")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["KERAS_VAULTGEMMA_HOME"] = folder
        main()
