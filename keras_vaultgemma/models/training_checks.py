"""What has to be right before the causal language model is trained or evaluated."""

from keras_vaultgemma.training.optimizers import check_variables


class TrainingChecks:
    """The part of `CausalLMTrainer` that checks the model before Keras begins.

    On JAX an error inside Keras's step would leave the model without values.
    """

    def _begin_training(self, options):
        """Check the model and the options of `fit`."""
        self._check_trainable_dtypes()
        self._begin_evaluation()
        if options.get("class_weight") is not None and self.private_training is None:
            raise ValueError(
                "`class_weight` must be None, because the classes are the tokens of the vocabulary "
                "and every row has many labels: weight them by `sample_weight` of shape [B, T]. "
                f"Received: class_weight={options['class_weight']!r}"
            )

    def _build_optimizer(self):
        """Build the optimizer, or check that it was built for what is to be trained."""
        if self.optimizer and not self.optimizer.built:
            # TensorFlow traces a step that creates variables twice: a second for each block.
            self.optimizer.build(self.trainable_variables)
        elif self.optimizer:
            check_variables(self.optimizer, self.trainable_variables)

    def _begin_evaluation(self):
        if self._steps is not None and self._overrides("compute_loss"):  # since `compile`
            self._steps = self.train_function = self.test_function = None

    def _check_trainable_dtypes(self):
        for variable in self.trainable_variables:
            if variable.dtype in ("bfloat16", "float16"):
                raise ValueError(
                    "`fit` needs float32 weights to train, because Keras's Adam does not move "
                    '16-bit ones at all: load the model with dtype="mixed_bfloat16" or '
                    'dtype="float32", or call `backbone.enable_lora`, whose factors are float32. '
                    f"Received: {variable.path} of dtype {variable.dtype}"
                )
