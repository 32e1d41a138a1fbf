"""Selection of the generator that a sampler needs, compiled until something in it changes."""

import warnings

import keras
import keras_hub
import numpy as np

from keras_vaultgemma.generation.beam_search import BeamSearch
from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.generation.prompt_lookup import PromptLookup
from keras_vaultgemma.generation.search import SearchGenerator
from keras_vaultgemma.generation.validation import check_sampler


class GeneratorCache:
    """The generators of a model by kind, each with what it was compiled for.

    It is no dict, because Keras would track the variables of what a dict of a model holds: a random
    sampler's would become the model's own, or, of a quantized model, be rejected.
    """

    def __init__(self):
        self.stored = {}


def find_generator(model, cache, prompt_lookup=False, length_penalty=None):
    """Return the generator of a model and its sampler.

    A new one is made after the sampler, one of its attributes or `run_eagerly` was changed, or
    variables were added or replaced, because these are constants of compiled functions.

    Args:
        model: has `sampler`, and what `Generator` needs.
        cache: `GeneratorCache`.
        prompt_lookup: bool, as for `generate`. Defaults to False.
        length_penalty: as for `generate`. Defaults to None.

    Raises:
        ValueError: If the sampler has an attribute out of its range.
    """
    sampler = model.sampler
    check_sampler(sampler, length_penalty)
    kind = PromptLookup if prompt_lookup else _kind(sampler)
    state = [
        model.run_eagerly,
        id(sampler),
        {name: _frozen(value) for name, value in vars(sampler).items()},
        list(map(id, model.variables)),
    ]
    found = cache.stored.get(kind)
    if found is None or found[0] != state:
        # What an id belongs to is stored with it, so that no other object gets the same one.
        alive = (sampler, list(vars(sampler).values()))
        found = state, alive, kind(model, sampler, model.run_eagerly)
        cache.stored[kind] = found
    return found[2]


def _kind(sampler):
    base, beam = keras_hub.samplers.Sampler, keras_hub.samplers.BeamSampler
    if type(sampler).__call__ is base.__call__:
        return Generator
    methods = ("__call__", "compute_probabilities")
    is_beam = all(getattr(type(sampler), name) is getattr(beam, name) for name in methods)
    return BeamSearch if is_beam else SearchGenerator


def _frozen(value):
    """Return what tells whether an attribute has changed."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return type(value), value
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), [_frozen(item) for item in value]
    if isinstance(value, dict):
        return [(_frozen(name), _frozen(item)) for name, item in value.items()]
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), value.tobytes()
    return id(value)


def restore_sampler(config):
    """Return the sampler of a config, or a greedy one, with a warning, if its class is unknown."""
    try:
        # Not keras-hub's `deserialize`, which returns the names of classes that it does not know.
        return keras.saving.deserialize_keras_object(config)
    except (TypeError, ValueError, ImportError, AttributeError) as error:
        warnings.warn(
            f"The sampler {config.get('class_name')} of the saved model cannot be restored, and "
            "the model is greedy: register its class with "
            "`keras.saving.register_keras_serializable()`, give it a `get_config`, or call "
            f"`compile(sampler=...)`. ({error})",
            stacklevel=2,
        )
        return keras_hub.samplers.GreedySampler()
