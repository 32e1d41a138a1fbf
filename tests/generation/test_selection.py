"""The sampler of a model: kept by files and copies, and read at each call."""

import keras
import keras_hub
import pytest
from common import one_layer_preset, random_backbone

from keras_vaultgemma import VaultGemmaCausalLM

samplers = keras_hub.samplers
OPTIONS = dict(max_new_tokens=12, stop_token_ids=None, strip_prompt=True)

SAMPLERS = [
    samplers.GreedySampler(temperature=2.0),
    samplers.RandomSampler(seed=3, temperature=0.7),
    samplers.TopKSampler(k=3, seed=4, temperature=0.8),
    samplers.TopPSampler(p=0.6, k=20, seed=5, temperature=1.2),
    samplers.BeamSampler(num_beams=2, return_all_beams=False, temperature=1.1),
    samplers.ContrastiveSampler(k=4, alpha=0.3, temperature=0.9),
]


@pytest.fixture
def model():
    return VaultGemmaCausalLM(random_backbone(num_layers=1))


@pytest.mark.first_backend
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_copies_and_files_keep_the_sampler(model, tmp_path, sampler):
    model.compile(sampler=sampler)
    model.save(tmp_path / "model.keras")
    copies = [
        VaultGemmaCausalLM.from_config(model.get_config()),
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model)),
        keras.saving.load_model(tmp_path / "model.keras"),
    ]
    for copy in copies:
        assert type(copy.sampler) is type(sampler)
        assert copy.sampler.get_config() == sampler.get_config()
    assert copies[-1].generate([2, 5], **OPTIONS) == model.generate([2, 5], **OPTIONS)


@keras.saving.register_keras_serializable(package="tests")
class Forbidding(samplers.RandomSampler):
    def __init__(self, forbidden=5, **kwargs):
        super().__init__(**kwargs)
        self.forbidden = forbidden

    def get_next_token(self, probabilities):
        allowed = keras.ops.arange(probabilities.shape[-1]) != self.forbidden
        return keras.ops.argmax(keras.ops.where(allowed, probabilities, 0.0), axis=-1)

    def get_config(self):
        return {**super().get_config(), "forbidden": self.forbidden}


@pytest.mark.first_backend
def test_samplers_of_the_users_own(model):
    model.compile(sampler=Forbidding(forbidden=9))
    copy = VaultGemmaCausalLM.from_config(model.get_config())
    assert type(copy.sampler) is Forbidding and copy.sampler.forbidden == 9

    class Local(samplers.GreedySampler):
        pass

    model.compile(sampler=Local())
    config = model.get_config()
    with pytest.warns(UserWarning, match="sampler Local of the saved model cannot be restored"):
        copy = VaultGemmaCausalLM.from_config(config)
    assert type(copy.sampler) is samplers.GreedySampler


@pytest.mark.first_backend
def test_a_preset_has_no_sampler(tmp_path):
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    model.compile(sampler="top_k")
    model.save_to_preset(tmp_path / "preset")
    assert "Sampler" not in (tmp_path / "preset/task.json").read_text()
    for cls in (VaultGemmaCausalLM, keras_hub.models.CausalLM):
        assert type(cls.from_preset(str(tmp_path / "preset")).sampler) is samplers.GreedySampler


@pytest.mark.first_backend
def test_changes_of_the_sampler_take_effect_at_the_next_call(model):
    def text(**options):
        return model.generate([2, 17], seed=3, **OPTIONS, **options)

    greedy = text()
    model.sampler = samplers.TopKSampler(k=20)
    expected = text()
    assert expected != greedy
    model.sampler.temperature = 1e-4
    assert text() == greedy
    model.sampler.temperature = 1.0
    assert text() == expected
    model.sampler.k = 1
    assert text() == greedy
    model.sampler = samplers.RandomSampler()
    assert text() not in (greedy, expected)
    model.sampler = samplers.GreedySampler()
    assert text() == greedy == text(prompt_lookup=True)


@pytest.mark.first_backend
def test_changes_of_an_own_sampler_and_of_beams_take_effect(model):
    model.compile(sampler=Forbidding(forbidden=127))
    first = model.generate([2, 17], **OPTIONS)
    model.sampler.forbidden = first[0]
    assert first[0] not in model.generate([2, 17], **OPTIONS)
    model.compile(sampler="beam")
    model.generate([2, 17], **OPTIONS)
    model.sampler.num_beams = 1
    greedy = VaultGemmaCausalLM(model.backbone).generate([2, 17], **OPTIONS)
    assert model.generate([2, 17], **OPTIONS) == greedy
    generator = model._generator()
    assert model._generator() is generator
