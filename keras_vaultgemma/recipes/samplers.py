"""Samplers of keras-hub by name, for the command line."""

SAMPLERS = {
    "greedy": ("GreedySampler", ()),
    "random": ("RandomSampler", ("temperature", "seed")),
    "top_k": ("TopKSampler", ("temperature", "seed")),
    "top_p": ("TopPSampler", ("temperature", "seed")),
    "beam": ("BeamSampler", ("temperature",)),
    "contrastive": ("ContrastiveSampler", ("temperature",)),
}
"""For each name, the class in `keras_hub.samplers` and the options that have an effect on it."""

LARGEST_SEED = 2**31 - 1
"""Largest seed that all three backends accept."""


def make_sampler(name, **options):
    """Create a sampler of keras-hub.

    Args:
        name: string. A key of `SAMPLERS`.
        **options: `temperature` and `seed`. None stands for the default of the sampler.

    Returns:
        `keras_hub.samplers.Sampler`.

    Raises:
        ValueError: If an option is out of its range or has no effect on the sampler.
    """
    import keras_hub

    class_name, accepted = SAMPLERS[name]
    options = {option: value for option, value in options.items() if value is not None}
    for option, value in options.items():
        if option not in accepted:
            samplers = ", ".join(key for key, (_, names) in SAMPLERS.items() if option in names)
            raise ValueError(
                f"--{option} has no effect with --sampler {name}, only with {samplers}. "
                f"Received: --{option} {value}"
            )
    # Written so that NaN fails it.
    if not 0 < options.get("temperature", 1.0) < float("inf"):
        raise ValueError(
            f"--temperature must be a number above 0. Received: {options['temperature']}"
        )
    if not 0 <= options.get("seed", 0) <= LARGEST_SEED:
        raise ValueError(f"--seed must be from 0 to {LARGEST_SEED}. Received: {options['seed']}")
    return getattr(keras_hub.samplers, class_name)(**options)
