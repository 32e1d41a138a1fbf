"""Samplers of keras-hub by name, for the command line."""

SAMPLERS = {
    "greedy": ("GreedySampler", ()),
    "random": ("RandomSampler", ("temperature", "seed")),
    "top_k": ("TopKSampler", ("temperature", "seed", "top_k")),
    "top_p": ("TopPSampler", ("temperature", "seed", "top_p", "top_k")),
    "beam": ("BeamSampler", ("temperature",)),
    "contrastive": ("ContrastiveSampler", ("temperature",)),
}
"""For each name, the class in `keras_hub.samplers` and the options that have an effect on it."""

NEEDS = {"top_p": "top_p", "top_k": "top_k", "temperature": "random"}
"""For each option, the sampler that it asks for if no sampler is named. The first counts."""

LARGEST_SEED = 2**31 - 1
"""Largest seed that all three backends accept."""


def make_sampler(name=None, **options):
    """Create a sampler of keras-hub.

    Args:
        name: string. A key of `SAMPLERS`. Defaults to the sampler that the options need, and to
            "greedy" without any.
        **options: `temperature`, `top_k`, `top_p` and `seed`. None stands for the default of the
            sampler.

    Returns:
        `keras_hub.samplers.Sampler`.

    Raises:
        ValueError: If an option is out of its range or has no effect on the sampler.
    """
    import keras_hub

    options = {option: value for option, value in options.items() if value is not None}
    if name is None:
        name = next((NEEDS[option] for option in NEEDS if option in options), "greedy")
    class_name, accepted = SAMPLERS[name]
    for option, value in options.items():
        if option not in accepted:
            samplers = ", ".join(key for key, (_, names) in SAMPLERS.items() if option in names)
            flag = f"--{option.replace('_', '-')}"
            raise ValueError(
                f"{flag} has no effect with --sampler {name}, only with {samplers}. "
                f"Received: {flag} {value}"
            )
    # Written so that NaN fails it.
    if not 0 < options.get("temperature", 1.0) < float("inf"):
        raise ValueError(
            f"--temperature must be a number above 0. Received: {options['temperature']}"
        )
    if options.get("top_k", 1) < 1:
        raise ValueError(f"--top-k must be a positive integer. Received: {options['top_k']}")
    if not 0 < options.get("top_p", 1.0) <= 1:
        raise ValueError(
            f"--top-p must be a number above 0 and at most 1. Received: {options['top_p']}"
        )
    if not 0 <= options.get("seed", 0) <= LARGEST_SEED:
        raise ValueError(f"--seed must be from 0 to {LARGEST_SEED}. Received: {options['seed']}")
    names = {"top_k": "k", "top_p": "p"}
    arguments = {names.get(option, option): value for option, value in options.items()}
    return getattr(keras_hub.samplers, class_name)(**arguments)
