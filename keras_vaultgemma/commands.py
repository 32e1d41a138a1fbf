"""What each subcommand does with its options: one call of the library, and the text to print.

They import what they need when they run, so that a Keras backend that cannot be loaded is an error like any other.
"""

import sys

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
"""The largest that all three backends take."""


def generate(options):
    """The prompt and its continuation, as it is generated; for a chat the reply alone."""
    from keras_vaultgemma import VaultGemmaCausalLM, backend, presets, prompts

    text = _prompt(options.prompt)
    backend.cache_compilations(presets.cache_home() / "compiled")
    sampler = _sampler(options.sampler, temperature=options.temperature, seed=options.seed)
    model = VaultGemmaCausalLM.from_preset(options.preset, **({"dtype": options.dtype} if options.dtype else {}))
    model.compile(sampler=sampler)
    inputs = [{"role": "user", "content": text}] if options.chat else text
    context = model.backbone.max_sequence_length
    (row,) = prompts.read(inputs, model.preprocessor, model.backbone.vocabulary_size).rows
    if len(row) >= context:
        raise ValueError(
            f"PROMPT must have at most {context - 1} tokens, `<bos>` included: the model's context is {context}. "
            f"Received: {len(row)} tokens"
        )
    stream = model.stream(inputs, max_new_tokens=min(options.max_new_tokens, context - len(row)), stop=options.stop)
    return _continuation("" if options.chat else model.preprocessor.detokenize([row])[0], stream)


def _continuation(prompt, stream):
    """The pieces of a stream behind its prompt; raises what ended it."""
    yield prompt
    yield from stream
    if stream.finish_reason == "interrupted":
        raise KeyboardInterrupt


def convert(options):
    """Write a checkpoint in another format, tensor by tensor."""
    from keras_vaultgemma.conversion import convert

    metadata = convert(**{name: value for name, value in vars(options).items() if name != "command"})
    count, dtype = metadata["parameter_count"], metadata["dtype"]
    return f"{options.target}: {count:,} parameters in {dtype}" + (", equal to the source" if options.verify else "")


def info(options):
    """What a preset is: architecture, parameters, tokenizer and privacy, from its small files."""
    from keras_vaultgemma.description import describe

    return describe(options.preset)


def finetune(options):
    """Train on a file of texts or of prompts and responses; the same command again goes on where it was killed."""
    from keras_vaultgemma import finetuning

    return finetuning.finetune(**{name: value for name, value in vars(options).items() if name != "command"})


def epsilon(options):
    """What DP-SGD would promise: ε of a noise multiplier, or the noise multiplier of an ε."""
    from keras_vaultgemma.privacy import budget_report

    return budget_report.report(
        options.rows, options.batch, options.epochs, options.noise, options.epsilon, options.delta, options.png
    )


def _prompt(argument):
    """The argument, or what a pipe holds without its last line break."""
    if argument is not None:
        return argument
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
    if not piped:
        raise ValueError("PROMPT must be an argument or come through a pipe. Received: neither")
    return piped


def _sampler(name, **options):
    """A sampler of `keras_hub.samplers` with those `options` that are not None."""
    import keras_hub

    class_name, takes = SAMPLERS[name]
    options = {option: value for option, value in options.items() if value is not None}
    for option, value in options.items():
        if option not in takes:
            able = ", ".join(other for other, (_, taken) in SAMPLERS.items() if option in taken)
            raise ValueError(
                f"--{option} changes nothing with --sampler {name}; it goes with {able}. Received: --{option} {value}"
            )
    # Not `<= 0`, so that NaN is refused.
    if not 0 < options.get("temperature", 1.0) < float("inf"):
        raise ValueError(f"--temperature must be a number above 0. Received: {options['temperature']}")
    if not 0 <= options.get("seed", 0) <= LARGEST_SEED:
        raise ValueError(f"--seed must be from 0 to {LARGEST_SEED}. Received: {options['seed']}")
    return getattr(keras_hub.samplers, class_name)(**options)
