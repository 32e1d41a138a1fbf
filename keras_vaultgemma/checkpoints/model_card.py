"""Model cards: how a model is loaded, its origin, and what is stated about its privacy."""

LABELS = {
    "epsilon": "ε",
    "delta": "δ",
    "unit": "unit of protection",
    "mechanism": "mechanism",
    "noise_multiplier": "noise multiplier",
    "accounting": "accounting",
    "covers": "what it covers",
    "source": "source",
}
"""Words of the model card for the keys of a privacy statement."""

NO_LICENCE = "The source states no licence; its terms apply to this copy too"

USAGE = {
    "keras": """```python
from keras_vaultgemma import VaultGemmaCausalLM

model = VaultGemmaCausalLM.from_preset("path/to/this/folder"{without_text})
```""",
    "hf": """```python
from transformers import AutoModelForCausalLM{and_tokenizer}

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"){load_tokenizer}
```""",
    "gguf": """```
llama-cli --model model.gguf
ollama create my_model --file Modelfile
ollama run my_model
```""",
    "onnx": """```python
import onnxruntime

session = onnxruntime.InferenceSession("path/to/this/folder/model.onnx")
inputs = {{"token_ids": token_ids, "padding_mask": padding_mask}}  # int32 [batch, length]
logits = session.run(None, inputs)[0]
```""",
    "openvino": """```python
import openvino

model = openvino.compile_model("path/to/this/folder/model.xml")
logits = model({{"token_ids": token_ids, "padding_mask": padding_mask}})[0]
```""",
    "saved_model": (
        "```python\n"
        "import tensorflow as tf\n"
        "import tensorflow_text  # registers what `generate` needs, from strings to strings\n"
        "\n"
        'model = tf.saved_model.load("path/to/this/folder")\n'
        'logits = model.serve({{"token_ids": token_ids, "padding_mask": padding_mask}})\n'
        'texts = model.generate(tf.constant(["Once upon a time"]), tf.constant(20))\n'
        "```"
    ),
    "transformers.js": """```js
import {{env, pipeline}} from "@huggingface/transformers";

env.localModelPath = "path/to/the/folder/above/";
const generate = await pipeline("text-generation", "name_of_this_folder");
const [{{generated_text}}] = await generate("Once upon a time", {{max_new_tokens: 40}});
```""",
}
"""How a model is loaded, by the format."""

HEADERS = {
    "keras": ["library_name: keras-hub"],
    "hf": ["library_name: transformers"],
    "gguf": [],
    "transformers.js": ["library_name: transformers.js"],
    "onnx": ["library_name: onnx"],
    "openvino": ["library_name: openvino"],
    "saved_model": [],
}
"""Lines about the format in the card's header."""


AS_GEMMA = """\
Written as Gemma 1, which computes the same as this VaultGemma, for engines that do not know the
latter."""


def model_card(to, metadata, hyperparameters, has_vocabulary, training=(), is_gemma=False):
    """Return the text of a model card (README.md).

    Args:
        to: string. Format of the folder, a key of `USAGE`.
        metadata: dict. Content of metadata.json.
        hyperparameters: dict. Constructor arguments of the backbone, as `reader.open_values`
            returns them.
        has_vocabulary: bool. True if the folder has a vocabulary.
        training: iterable of strings. One sentence for each training run that the privacy ledger
            lists.
        is_gemma: bool. True if the model is written as Gemma 1. Defaults to False.
    """
    source = metadata["source"]
    revision = f", revision `{source['revision']}`" if source["revision"] else ""
    usage = USAGE[to].format(
        without_text="" if has_vocabulary else ", preprocessor=None",
        and_tokenizer=", AutoTokenizer" if has_vocabulary else "",
        load_tokenizer='\ntokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
        if has_vocabulary
        else "",
    )
    tags = ["vaultgemma", "differential-privacy", *([] if to in ("keras", "hf") else [to])]
    layers = {
        name: hyperparameters["layer_types"].count(name)
        for name in sorted(set(hyperparameters["layer_types"]))
    }
    shown = {
        **hyperparameters,
        "layer_types": ", ".join(f"{count} x {name}" for name, count in layers.items()),
    }
    return "\n".join(
        [
            "---",
            *HEADERS[to],
            "pipeline_tag: text-generation",
            f"tags: [{', '.join(tags)}]",
            "---",
            "",
            "# VaultGemma",
            "",
            str(metadata.get("description") or "A decoder of the Gemma family."),
            "",
            *([AS_GEMMA, ""] if is_gemma else []),
            usage,
            "",
            "## Source",
            "",
            f"Converted from `{source['name']}`{revision} by keras_vaultgemma "
            f"{metadata['keras_vaultgemma_version']}, stored in {metadata['dtype']}. "
            "`metadata.json` has the SHA-256 of every file of the source and of this folder.",
            "",
            "## Architecture",
            "",
            f"- parameters: {metadata['parameter_count']:,}",
            *[f"- {name}: {value}" for name, value in shown.items()],
            "",
            "## Privacy",
            "",
            *privacy_sentences(metadata, training),
            "",
            "## Licence",
            "",
            f"{metadata.get('license') or NO_LICENCE}.",
            "",
        ]
    )


def training_sentences(ledger):
    """Return a sentence for each training run in a privacy ledger."""
    sentences = [f"trained privately since: {run}" for run in ledger.describe()]
    if plain := ledger.without_privacy():
        sentences.append(f"without privacy since: {plain}")
    return sentences


def privacy_sentences(metadata, training=()):
    """Return what a source states about privacy, and a line for each training run since.

    Args:
        metadata: dict. Content of metadata.json.
        training: iterable of strings. Sentences of the privacy ledger.
    """
    return [*_statement(metadata), *[f"- {sentence}" for sentence in training]]


def _statement(metadata):
    if "privacy" not in metadata:
        return ["The source makes no statement about privacy."]
    if not metadata["privacy"]:
        return ["The source states that it was not trained with differential privacy."]
    statement = metadata["privacy"]
    if not isinstance(statement, dict):
        return [str(statement)]
    return [f"- {LABELS.get(key, key)}: {value}" for key, value in statement.items()]
