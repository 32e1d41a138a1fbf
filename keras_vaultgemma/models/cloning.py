"""Copies of a model that Keras makes layer by layer, which are rejected."""


class LayerwiseCloning:
    """Mixin of a functional model that `keras.models.clone_model` cannot copy."""

    def _run_through_graph(self, *args, **kwargs):
        # A private method of Keras, and the only one of a model that its `clone_model` calls.
        caller = getattr(kwargs.get("operation_fn"), "__module__", None) or ""
        if caller.endswith(".cloning"):
            name = type(self).__name__
            raise ValueError(
                f"`model` of `clone_model` must not be a {name}, of which it would make a plain "
                "functional model without adapters, whose head is not tied to its embedding. Use "
                f"`{name}.from_config(model.get_config())` for new weights, or "
                "`copy.deepcopy(model)` for the same weights, adapters and ledger"
            )
        return super()._run_through_graph(*args, **kwargs)
