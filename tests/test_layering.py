"""The import rule of the house, read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "keras_vaultgemma"
# A module may import those of lower floors, and of its own floor those before it.
FLOORS = [
    [
        "choice",
        "tensors",
        "recording",
        "compilation",
        "devices",
        "gradients",
        "loops",
        "memory",
        "noise",
        "products",
        "tensorflow_data",
        "recomputation",
        "train_step",
    ],
    ["ids", "hubs", "presets", "saving", "picture"],
    ["secret_key", "fingerprint", "loss_distribution", "accounting", "ledger", "open_run", "record"],
    ["cache", "low_rank", "layers"],
    ["attention"],
    ["decoder_block"],
    [
        "weight_layout",
        "stored_tensor",
        "safetensors_file",
        "h5_file",
        "hyperparameters",
        "checkpoint_config",
        "checkpoint",
        "distribution",
        "adapter",
        "adapted_layers",
        "lora",
        "read_ahead",
        "backbone",
    ],
    ["tokenizer", "preprocessor", "prompts", "training_data", "packing", "text_stream"],
    ["batches", "state_file", "training_state", "checkpointed_run", "checkpointing"],
    ["sampling", "prefill", "decode_state", "generation", "search", "prompt_lookup", "completion", "loss"],
    ["noise_seeds", "row_sampling", "private_batches", "plan", "budget_report"],
    ["dpsgd", "mechanism", "refusals", "private_run", "training"],
    ["scoring", "fine_tuning", "causal_lm"],
    ["rows", "held_out", "pace", "curves", "run_folder", "recipe"],
    ["progress", "provenance", "model_card", "keras_preset", "hugging_face_folder", "verification", "converter"],
    ["description"],
    ["commands", "cli"],
]
PACKAGES = tuple("keras_vaultgemma" + name for name in ("", ".backend", ".conversion", ".finetuning", ".privacy"))
ORDER = [name for floor in FLOORS for name in floor]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem not in ("__init__", "__main__"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ([f"{node.module}.{a.name}" for a in node.names] if node.module in PACKAGES else [node.module])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_run_downward(path):
    assert path.stem in ORDER, "a new module needs a floor"
    for name in imports(path):
        parts = name.split(".")
        imported = next((part for part in parts[1:] if part in ORDER), None)
        if parts[0] == "keras_vaultgemma" and imported:
            assert ORDER.index(imported) < ORDER.index(path.stem), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_what_nobody_imports(path):
    for name in imports(path):
        root = name.split(".")[0]
        assert not name.startswith(("keras.src", "keras_hub.src")), name
        assert root not in ("tools", "tests", "transformers"), name
        assert root not in ("tensorflow", "tensorflow_text", "jax", "torch") or path.parent.name == "backend", name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_only_one_package_asks_which_backend_runs(path):
    if path.parent.name != "backend":
        assert "config.backend()" not in path.read_text(encoding="utf-8")


def test_every_module_has_a_test():
    tests = Path(__file__).parent
    assert [path.stem for path in MODULES if not (tests / f"test_{path.stem}.py").exists()] == []
