"""One fairy tale from three frameworks: `python tools/demo.py [BACKEND ...]`.

A process loads one Keras backend, so the package's own command runs once for each. Greedy decoding leaves nothing to
chance: where two backends tell different stories, the demo shows where they part and exits with code 1.
"""

import os
import shlex
import subprocess
import sys
import textwrap
import time

BACKENDS = ("jax", "torch", "tensorflow")
PROMPT = "The Fox and the"
ARGUMENTS = ["generate", PROMPT, "--max-new-tokens", "60"]
WIDTH = 76
CONTEXT = 40  # characters shown on either side of a difference


def tell(backend):
    """The text that one backend generates, or None with its error on standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "keras_vaultgemma", *ARGUMENTS],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        print(f"\n{done.stderr.strip()}", file=sys.stderr)
        return None
    return done.stdout.removesuffix("\n")


def difference(name, text, other_name, other_text):
    """Where two texts part, for people."""
    pairs = zip(text, other_text, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other_text)))
    width = max(len(name), len(other_name))
    return "\n".join(
        [
            f"{name} and {other_name} tell different stories after {text[max(0, same - CONTEXT) : same]!r}:",
            f"  {name:{width}}  {text[same : same + CONTEXT]!r}",
            f"  {other_name:{width}}  {other_text[same : same + CONTEXT]!r}",
        ]
    )


def main(backends):
    sys.stdout.reconfigure(errors="replace")  # quotation marks on a terminal that has none
    print("VaultGemma, the tiny one: 2.8 million parameters, raised on fairy tales.\n")
    print(f"  $ keras-vaultgemma {shlex.join(ARGUMENTS)}\n")
    first = None
    for backend in backends:
        print(f"  {backend:<10} ", end="", flush=True)
        start = time.perf_counter()
        text = tell(backend)
        if text is None:
            return 1
        print(f"{time.perf_counter() - start:5.1f} s")
        if first is None:
            first = text
        elif text != first:
            print(f"\n{difference(backends[0], first, backend, text)}", file=sys.stderr)
            return 1
    print()
    for line in first.splitlines():
        print(textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="  "))
    print(f"\nAll {len(backends)} frameworks tell the same story, word for word.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or BACKENDS))
