"""Samplers by name, for the command line."""

SAMPLERS = {
    "greedy": ("GreedySampler", ()),
    "random": ("RandomSampler", ("temperature", "seed")),
    "top_k": ("TopKSampler", ("temperature", "seed")),
    "top_p": ("TopPSampler", ("temperature", "seed")),
    "beam": ("BeamSampler", ("temperature",)),
    "contrastive": ("ContrastiveSampler", ("temperature",)),
}
"""Name of a sampler: its class in `keras_hub.samplers`, and the options that change what it chooses."""

LARGEST_SEED = 2**31 - 1
"""The largest seed that all three backends take."""


def make_sampler(name, **options):
    """Return the sampler `name` of `keras_hub.samplers` with those `options` that are not None."""
    import keras_hub

    class_name, takes = SAMPLERS[name]
    options = {option: value for option, value in options.items() if value is not None}
    for option, value in options.items():
        if option not in takes:
            able = ", ".join(other for other, (_, taken) in SAMPLERS.items() if option in taken)
            raise ValueError(
                f"--{option} changes nothing with --sampler {name}; it goes with {able}. Received: --{option} {value}"
            )
    # Not `<= 0`, so that NaN is rejected.
    if not 0 < options.get("temperature", 1.0) < float("inf"):
        raise ValueError(
            f"--temperature must be a number above 0. Received: {options['temperature']}"
        )
    if not 0 <= options.get("seed", 0) <= LARGEST_SEED:
        raise ValueError(f"--seed must be from 0 to {LARGEST_SEED}. Received: {options['seed']}")
    return getattr(keras_hub.samplers, class_name)(**options)
