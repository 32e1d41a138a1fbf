"""The functions that Keras compiles for `fit`, `evaluate` and `predict`."""

from keras_vaultgemma.lora.state import adapter_state, forget_compiled_functions


class CompiledFunctions:
    """Mixin of a model whose compiled functions follow its adapters. It precedes the Keras class.

    They refer to the variables that they were compiled with, and contain an adapter's scale. An
    adapter can be changed through the backbone, which knows no model, and by loading weights.
    """

    _compiled_for = None

    def make_train_function(self, force=False):
        self._forget_those_of_other_variables()
        return super().make_train_function(force)

    def make_test_function(self, force=False):
        self._forget_those_of_other_variables()
        return super().make_test_function(force)

    def make_predict_function(self, force=False):
        self._forget_those_of_other_variables()
        return super().make_predict_function(force)

    def _forget_those_of_other_variables(self):
        state = adapter_state(self)
        adapter = state.stored.get(state.active)
        adapter, variables = adapter and adapter.without_values(), list(self.backbone.variables)
        if self._compiled_for is not None:
            old_adapter, old = self._compiled_for()
            if adapter != old_adapter or list(map(id, variables)) != list(map(id, old)):
                forget_compiled_functions(self)
        # A function, because Keras would track a list of variables.
        self._compiled_for = lambda: (adapter, variables)
