"""Sums of clipped gradients over several devices, each of which clips and sums its own rows.

A plain sum is added by the devices in whatever order they communicate; `mechanism.sum_rounding`
bounds what that rounds away. Pairs are added exactly, one device after the other, on every device,
because a pair of which each number was rounded on its own would have lost what it is for. That
takes D broadcasts of the pair instead of one sum, and the memory of two more pairs of one variable.
"""

from keras_vaultgemma import backend
from keras_vaultgemma.privacy.pairs import add_pairs


def sum_of_devices(function, divided, whole):
    """Call a function that computes `clipped_sum` on each device, and add the sums.

    Args:
        function: function of `(divided, whole)` that returns a tuple of a `ClippedSum` and nested
            tensors [n, ...].
        divided, whole: nested tensors, as in `backend.per_device`.

    Returns:
        What `function` returns, with the sum over all devices.
    """
    sensitivities = []

    def on_device(divided, whole):
        sums, results = function(divided, whole)
        sensitivities.append(sums.sensitivity)
        return results, sums._replace(sensitivity=None)  # which is not added

    results, sums = backend.per_device(on_device, divided, whole, _add_devices)
    return sums._replace(sensitivity=sensitivities[0]), results


def _add_devices(sums):
    """Return the sum of the `ClippedSum` of all devices."""
    if not sums.rests:
        return backend.sum_over_devices(sums)
    pairs = [
        backend.fold_over_devices(lambda a, b: add_pairs(*a, *b), pair)
        for pair in zip(sums.gradients, sums.rests, strict=True)
    ]
    gradients, rests = map(list, zip(*pairs, strict=True))
    statistics = sums._replace(gradients=[], rests=[])
    return backend.sum_over_devices(statistics)._replace(gradients=gradients, rests=rests)
