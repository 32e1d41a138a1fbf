"""The metadata.json and the model card of a converted model: its source and its privacy."""

import datetime
import hashlib
import os
from pathlib import Path

import keras
import keras_hub

from keras_vaultgemma._files import ignore_progress, is_legal_link, read_json
from keras_vaultgemma._version import __version__
from keras_vaultgemma.checkpoints import presets

HASH_CHUNK = 2**20
"""Bytes that are hashed at a time."""

STATEMENTS = ("license", "sources", "privacy")
"""Keys of Google's metadata that are copied to a conversion of its release."""


GRAPH_FILES = (
    "model.onnx",
    "model.onnx.data",
    "model.xml",
    "model.bin",
    "saved_model.pb",
    "fingerprint.pb",
    "variables/variables.*",
)
"""Files of ONNX, OpenVINO and TensorFlow."""


def model_files(folder, as_names=False):
    """Return the model files of a folder, of any of the formats.

    Args:
        folder: `pathlib.Path` or string.
        as_names: bool. If True, return a set of paths relative to the folder, with "/". Defaults to
            False, for a sorted list of `pathlib.Path`.
    """
    patterns = [
        *presets.DOWNLOADS["weights"],
        "assets/*/*.spm",
        "additional_chat_templates/*.jinja",
        "*.gguf",
        "onnx/*.onnx",
        "onnx/*.onnx_data*",
        *GRAPH_FILES,
        "Modelfile",
        "README.md",
    ]
    folder = Path(folder)
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    if as_names:
        return {path.relative_to(folder).as_posix() for path in paths}
    return sorted(paths)


def digests(folder, report=ignore_progress):
    """Return the SHA-256 digests of a model's files, except metadata.json.

    Links that leave the folder are left out, because a digest tells something about their target.

    Args:
        folder: `pathlib.Path` or string.
        report: callable. Called with the number of bytes of each chunk after it is read.

    Returns:
        Dict of paths relative to the folder to hexadecimal digests.
    """
    folder = Path(folder)
    files = [path for path in model_files(folder) if path != folder / presets.METADATA]
    files = [path for path in files if is_legal_link(path, folder)]
    return {path.relative_to(folder).as_posix(): sha256(path, report) for path in files}


def sha256(path, report=ignore_progress):
    """Return the hexadecimal SHA-256 of a file, which is read in chunks."""
    digest, buffer = hashlib.sha256(), bytearray(HASH_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            report(count)
    return digest.hexdigest()


def new_metadata(source, folder, source_digests, parameter_count, dtype):
    """Return the content of metadata.json, without the digests of the new files.

    The metadata.json of the source is copied: its licence, its privacy statement and every other
    key. If the source has none and is Google's release, by its name and its number of parameters,
    the statements of the bundled vaultgemma_1b preset are used. No other source gets a privacy
    statement that it does not make.

    Args:
        source: string or path. The name, handle or folder that the user gave. Only the last part of
            a folder is recorded.
        folder: `pathlib.Path` of the source's files.
        source_digests: dict of paths to digests, as `digests` returns it.
        parameter_count: int. Number of parameters of the model.
        dtype: string. Dtype of the new files.

    Returns:
        Dict that is serialisable as JSON.
    """
    path = folder / presets.METADATA
    statements = read_json(path) if path.is_file() else {}
    if not statements:
        release = presets.release_metadata(source, parameter_count)
        statements = {key: release[key] for key in STATEMENTS if key in release}
    name = os.fspath(source)
    earlier = statements.pop("source", None)
    statements.pop("files", None)
    return {
        **statements,
        "keras_version": keras.__version__,
        "keras_hub_version": keras_hub.__version__,
        "keras_vaultgemma_version": __version__,
        "parameter_count": parameter_count,
        "dtype": dtype,
        "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
        "tasks": ["CausalLM"],
        "source": {
            "name": folder.resolve().name if Path(name).is_dir() else name,
            "revision": _revision(name, folder),
            "files": source_digests,
            **({"source": earlier} if earlier else {}),
        },
    }


def _revision(name, folder):
    """Return the commit or version that a folder in a hub's cache is named after, or None."""
    if folder.parent.name == "snapshots":
        return folder.name
    return folder.name if folder.name.isdigit() and not Path(name).is_dir() else None


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
    "saved_model": """```python
import tensorflow as tf
import tensorflow_text  # where the model has `generate`, from strings to strings

model = tf.saved_model.load("path/to/this/folder")
logits = model.serve({{"token_ids": token_ids, "padding_mask": padding_mask}})
texts = model.generate(tf.constant(["Once upon a time"]), tf.constant(20))
```""",
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
