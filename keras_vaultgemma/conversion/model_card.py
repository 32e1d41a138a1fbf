"""README.md of a converted model, written from its metadata."""

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
"""Keys of a privacy statement, in words."""

USE = {
    "keras": """```python
from keras_vaultgemma import VaultGemmaCausalLM

model = VaultGemmaCausalLM.from_preset("path/to/this/folder"{without_text})
```""",
    "hf": """```python
from transformers import AutoModelForCausalLM{and_tokenizer}

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"){load_tokenizer}
```""",
}


def model_card(to, metadata, hyperparameters, has_vocabulary, training=()):
    """Text of a model card.

    Args:
        to: "keras" or "hf", the format of the folder.
        metadata: as metadata.json holds it.
        hyperparameters: of the backbone, as `checkpoint.open_values` returns them.
        has_vocabulary: whether the folder has one.
        training: what the ledger says of training since, a sentence each.
    """
    source = metadata["source"]
    revision = f", revision `{source['revision']}`" if source["revision"] else ""
    use = USE[to].format(
        without_text="" if has_vocabulary else ", preprocessor=None",
        and_tokenizer=", AutoTokenizer" if has_vocabulary else "",
        load_tokenizer='\ntokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")' if has_vocabulary else "",
    )
    layers = {name: hyperparameters["layer_types"].count(name) for name in sorted(set(hyperparameters["layer_types"]))}
    shown = {**hyperparameters, "layer_types": ", ".join(f"{count} x {name}" for name, count in layers.items())}
    return "\n".join(
        [
            "---",
            f"library_name: {'keras-hub' if to == 'keras' else 'transformers'}",
            "pipeline_tag: text-generation",
            "tags: [vaultgemma, differential-privacy]",
            "---",
            "",
            "# VaultGemma",
            "",
            str(metadata.get("description") or "A decoder of the Gemma family."),
            "",
            use,
            "",
            "## Source",
            "",
            f"Converted from `{source['name']}`{revision} by keras_vaultgemma {metadata['keras_vaultgemma_version']}, "
            f"stored in {metadata['dtype']}. `metadata.json` has the SHA-256 of every file of the source and of this "
            "folder.",
            "",
            "## Architecture",
            "",
            f"- parameters: {metadata['parameter_count']:,}",
            *[f"- {name}: {value}" for name, value in shown.items()],
            "",
            "## Privacy",
            "",
            *_privacy(metadata),
            *[f"- {sentence}" for sentence in training],
            "",
            "## Licence",
            "",
            f"{metadata.get('license') or 'The source states no licence; its terms apply to this copy too'}.",
            "",
        ]
    )


def _privacy(metadata):
    if "privacy" not in metadata:
        return ["The source makes no statement about privacy."]
    if not metadata["privacy"]:
        return ["The source states that it was not trained with differential privacy."]
    statement = metadata["privacy"]
    if not isinstance(statement, dict):
        return [str(statement)]
    return [f"- {LABELS.get(key, key)}: {value}" for key, value in statement.items()]
