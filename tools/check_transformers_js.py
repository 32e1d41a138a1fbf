"""Compare a model here with transformers.js on what `convert --to transformers.js` makes of it.

    npm install @huggingface/transformers
    python tools/check_transformers_js.py [PRESET] [--adapter FOLDER] [--dtype q4]

Prints the texts with other token ids, the number of equal greedy tokens after each prompt, and the
largest difference of a logit. The one text has control tokens, "<bos>" and others, which Hugging
Face's tokenizers read as tokens wherever they stand in a text. transformers.js is looked up in the
root of the repository, or in the folder that the environment variable TRANSFORMERS_JS names.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from hard_texts import HARD
from node_package import ask_node, find_package

PROMPTS, COUNT = ["Once upon a time there was", "The fox"], 40


def transformers_js():
    """Return the folder of the installed package, or None."""
    return find_package("@huggingface/transformers", "TRANSFORMERS_JS")


def ask_transformers_js(folder):
    """Return what tools/transformers_js.mjs prints about a converted folder."""
    question = dict(model=str(folder), texts=HARD, prompts=PROMPTS, count=COUNT)
    return ask_node("transformers_js.mjs", question, TRANSFORMERS_JS=str(transformers_js()))


def compare(model, folder):
    """Return `(others, tokens, difference, answer)` for a model and its converted folder.

    `others` are the texts with other ids, and `tokens` has the number of greedy tokens before the
    first other one, for each prompt.
    """
    from keras import ops

    tokenizer = model.preprocessor.tokenizer
    answer = ask_transformers_js(folder)
    others = [
        text
        for text, theirs in zip(HARD, answer["texts"], strict=True)
        if theirs != list(map(int, tokenizer(text)))
    ]
    ids = [[tokenizer.start_token_id, *map(int, tokenizer(prompt))] for prompt in PROMPTS]
    assert answer["prompts"] == ids
    tokens = []
    for prompt, theirs in zip(ids, answer["generated"], strict=True):
        ours = model.generate(prompt, max_new_tokens=COUNT, strip_prompt=True)
        pairs = zip(theirs, map(int, ours), strict=False)
        tokens.append(next((i for i, (a, b) in enumerate(pairs) if a != b), len(theirs)))
    inputs = np.array(ids[:1], "int32")
    logits = ops.convert_to_numpy(
        model({"token_ids": inputs, "padding_mask": np.ones_like(inputs)})
    )
    difference = np.abs(logits - np.reshape(answer["logits"], logits.shape)).max()
    return others, tokens, float(difference), answer


def main():
    from keras_vaultgemma import VaultGemmaCausalLM, convert, lora

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("preset", nargs="?", default="vaultgemma_tiny")
    parser.add_argument("--adapter")
    parser.add_argument("--dtype", default="f32")
    options = parser.parse_args()
    if transformers_js() is None:
        raise SystemExit("transformers.js is not there: npm install @huggingface/transformers")
    model = VaultGemmaCausalLM.from_preset(options.preset)
    if options.adapter:
        lora.load_adapter(model, options.adapter)
    with tempfile.TemporaryDirectory() as root:
        source = options.adapter or options.preset
        folder = Path(root) / "model"
        convert(source, folder, to="transformers.js", dtype=options.dtype, verify=True)
        others, tokens, difference, _ = compare(model, folder)
        size = sum(path.stat().st_size for path in (folder / "onnx").iterdir())
    print(f"texts of {len(HARD)} with other ids: {others}")
    print(f"equal greedy tokens: {', '.join(map(str, tokens))} of {COUNT}")
    print(f"largest difference of a logit: {difference:.2g}")
    print(f"size of the ONNX files: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
