"""Names of presets as people type them: handles, addresses of pages, other names of the release."""

import difflib
import os
import re

RELEASE = "vaultgemma_1b"
"""The bundled preset whose metadata holds Google's statements about its release."""

REPOSITORY = "google/vaultgemma-1b"
RELEASE_HANDLES = (
    RELEASE,
    f"hf://{REPOSITORY}",
    "kaggle://keras/vaultgemma/keras/vault_gemma_1b_en",
    "kaggle://google/vaultgemma/transformers/1b",
)
"""The release, without revisions: on Hugging Face, and on Kaggle in the formats of Keras and
transformers."""

ALIASES = {
    REPOSITORY: f"hf://{REPOSITORY}",
    "vault_gemma_1b_en": RELEASE,  # keras-hub's name of it.
}

PAGES = (
    (
        r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)"
        r"(?:/(?:tree|blob|resolve|commit)/([\w.-]+)(?:/.*)?)?/?(?:[?#].*)?",
        lambda match: f"hf://{match[1]}" + (f"@{match[2]}" if match[2] else ""),
    ),
    (
        r"(?:https?://)?(?:www\.)?kaggle\.com/models/((?:[\w.-]+/){3}[\w.-]+(?:/\d+)?)/?(?:[?#].*)?",
        lambda match: f"kaggle://{match[1]}",
    ),
)
"""Patterns of addresses of a model's page, and for each a function from a match to the handle."""


def canonical(preset):
    """Return the name, folder or handle that a preset's name stands for.

    `~` becomes the user's folder, and the address of a page at Hugging Face or Kaggle a handle. The
    release has two more names. An existing folder is always taken as a folder.

    Args:
        preset: string or path.

    Returns:
        String.
    """
    name = os.path.expanduser(os.fspath(preset))
    if not isinstance(name, str):
        return ""
    if os.path.isdir(name):
        return name
    for pattern, handle in PAGES:
        if match := re.fullmatch(pattern, name):
            return handle(match)
    return ALIASES.get(name, name)


def is_release(preset):
    """Return True if a name or handle, with or without a revision, is that of Google's release."""
    return re.sub(r"@.*|/\d+$", "", canonical(preset)) in RELEASE_HANDLES


def suggest(name, bundled):
    """Return a sentence with the name that was probably meant, and a space; "" if there is none.

    Args:
        name: string that is no preset.
        bundled: iterable of the names of bundled presets.
    """
    if os.path.isfile(name):
        return f"That is a file; its folder is {os.path.dirname(name) or '.'!r}. "
    plain = {re.sub(r"\W|_", "", preset): preset for preset in bundled}
    last = re.sub(r"\W|_", "", name.rpartition("/")[2].lower())
    close = difflib.get_close_matches(last, plain, n=1, cutoff=0.7)
    is_local = name.startswith((".", "/", "~"))
    if "vaultgemma" in last and not is_local:
        return f"Did you mean {plain[close[0]] if close else RELEASE!r}? "
    if re.fullmatch(r"[\w-]+/[\w.-]+", name) and not is_local:
        return f"Did you mean 'hf://{name}'? "
    return f"Did you mean {plain[close[0]]!r}? " if close and not is_local else ""


def suggest_release(repository):
    """Return a sentence with the release's name if a repository's name is like it, else ""."""
    if repository != REPOSITORY and "vaultgemma" in repository.lower():
        return f". Google's release is {RELEASE!r}, or 'hf://{REPOSITORY}'"
    return ""
