"""Compare a model here with llama.cpp on the GGUF file that `convert --to gguf` makes of it.

    npm install node-llama-cpp
    python tools/check_llama_cpp.py [PRESET] [--adapter FOLDER] [--dtype q8_0]

Prints the number of texts with equal token ids, of equal greedy tokens, and the largest difference
of the probabilities of the next token. llama.cpp comes prebuilt with node-llama-cpp, from the root
of the repository or from the folder that the environment variable NODE_LLAMA_CPP names.
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

PROMPT, COUNT = "Once upon a time there was", 40
TURNS = ("<start_of_turn>", "<end_of_turn>")


def node_llama_cpp():
    """Return the folder of the installed package, or None."""
    return find_package("node-llama-cpp", "NODE_LLAMA_CPP")


def ask_llama_cpp(file, ids):
    """Return what tools/llama_cpp.mjs prints about a GGUF file."""
    question = dict(model=str(file), texts=HARD, ids=ids, count=COUNT)
    return ask_node("llama_cpp.mjs", question, NODE_LLAMA_CPP=str(node_llama_cpp()))


def compare(model, file):
    """Return `(texts, tokens, difference, answer)` for a model and its GGUF file.

    llama.cpp reads a turn marker as one token only where it also reads "<bos>" as one, so texts
    with markers are tokenized there with special tokens, as chats are, and the others without.
    """
    tokenizer = model.preprocessor.tokenizer
    ids = [tokenizer.start_token_id, *map(int, tokenizer(PROMPT))]
    answer = ask_llama_cpp(file, ids)
    texts = 0
    for text, plain, special in zip(HARD, answer["text"], answer["special"], strict=True):
        theirs = special if any(turn in text for turn in TURNS) else plain
        texts += theirs == list(map(int, tokenizer(text)))
    output = model.generate([PROMPT], max_new_tokens=COUNT, strip_prompt=True)
    pairs = zip(answer["generated"], map(int, tokenizer(output[0])), strict=False)
    tokens = sum(theirs == ours for theirs, ours in pairs)
    inputs = np.array([ids], "int32")
    logits = model({"token_ids": inputs, "padding_mask": np.ones_like(inputs)})
    difference = np.abs(softmax(logits[0]) - np.array(answer["probabilities"])).max()
    return texts, tokens, float(difference), answer


def softmax(logits):
    from keras import ops

    return ops.convert_to_numpy(ops.softmax(ops.cast(logits, "float32")))


def main():
    from keras_vaultgemma import VaultGemmaCausalLM, convert, lora

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("preset", nargs="?", default="vaultgemma_tiny")
    parser.add_argument("--adapter")
    parser.add_argument("--dtype", default="f32")
    options = parser.parse_args()
    if node_llama_cpp() is None:
        raise SystemExit("llama.cpp is not there: npm install node-llama-cpp")
    model = VaultGemmaCausalLM.from_preset(options.preset)
    if options.adapter:
        lora.load_adapter(model, options.adapter)
    with tempfile.TemporaryDirectory() as root:
        source = options.adapter or options.preset
        convert(source, f"{root}/gguf", to="gguf", dtype=options.dtype, verify=True)
        texts, tokens, difference, answer = compare(model, f"{root}/gguf/model.gguf")
    print(f"texts with equal ids: {texts} of {len(HARD)}")
    print(f"equal greedy tokens: {tokens} of {COUNT}")
    print(f"largest difference of a probability: {difference:.2g}")
    print(f"tokens that end generation: {answer['stops']}")


if __name__ == "__main__":
    main()
