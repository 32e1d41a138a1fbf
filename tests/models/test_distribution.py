"""Layouts are right, and a model on many devices equals the model on one: loss, gradients, optimizer state, ids."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras.distribution import DeviceMesh

from keras_vaultgemma import VaultGemmaBackbone
from keras_vaultgemma.checkpoints import weight_map
from keras_vaultgemma.checkpoints.config import read_config
from keras_vaultgemma.checkpoints.presets import find
from keras_vaultgemma.models.sharding import check_batches, variable_axes

WORKER = Path(__file__).parent / "distribution_worker.py"
ON_JAX = keras.config.backend() == "jax"
needs_jax = pytest.mark.skipif(not ON_JAX, reason="Keras distributes models on JAX only")
ONE_B = read_config(find("vaultgemma_1b", "config"))
TASK_MESHES = {
    "full": ["2x4"],
    "qlora": ["2x2"],
    "loaded": ["2x2"],
    "generate": ["1x4"],
    "save": ["1x4"],
    "shares": ["4", "2x4", "1x2"],
}
LONG_TASK_MESHES = {
    "full": ["2", "4", "8", "1x2", "1x4", "1x8"],
    "lora": ["1x2"],
    "generate": ["2"],
}
"""Meshes that add no kind of layout to the others, for `make test-all`."""
PROCESS_TASKS = ["2x2:lora", "2x2:save"]
LONG_PROCESS_TASKS = ["1x4:generate", "4:full", "1x4:full"]
PRIVATE_MESHES = {"sums": ["2x4"], "private": ["2x2"]}
LONG_PRIVATE_MESHES = {"sums": ["2", "4", "8"], "private": ["4"], "resumed": ["2"]}
PRIVATE_PROCESS_TASKS = ["4:private", "4:ledger"]
LONG_PRIVATE_PROCESS_TASKS = ["2x2:private"]


def tasks(meshes):
    """List of "mesh:task"."""
    return [f"{mesh}:{task}" for task, found in meshes.items() for mesh in found]


def cases(short, long):
    """The cases of `make test` and, marked, those that `make test-all` adds."""
    return [*short, *(pytest.param(case, marks=pytest.mark.long) for case in long)]


def of_task(task, short, long):
    return cases(short[task], long.get(task, []))


def mesh(*shape, axes=("batch", "model")):
    return DeviceMesh(shape, axes, [f"cpu:{i}" for i in range(int(np.prod(shape)))])


def axes_of(layout_map, path):
    layout = layout_map[path]
    return None if layout is None else layout.axes


@needs_jax
@pytest.mark.parametrize(
    "path, axes",
    [
        ("token_embedding/embeddings", ("model", None)),
        ("token_embedding/embeddings_scale", ("model",)),
        ("token_embedding/lora_embeddings_a", ("model", None)),
        ("token_embedding/lora_embeddings_b", None),
        *[
            (f"decoder_block_0/attention/{name}/weight", ("model", None))
            for name in ("query", "key", "value")
        ],
        ("decoder_block_25/attention/query/kernel_scale", ("model",)),
        ("decoder_block_25/attention/query/lora_kernel_a", None),
        ("decoder_block_25/attention/query/lora_kernel_b", (None, "model")),
        ("decoder_block_3/attention/attention_output/weight", (None, "model")),
        ("decoder_block_3/attention/attention_output/kernel_scale", None),
        ("decoder_block_3/attention/attention_output/lora_kernel_a", ("model", None)),
        ("decoder_block_3/attention/attention_output/lora_kernel_b", None),
        ("decoder_block_3/gate/weight", ("model", None)),
        ("decoder_block_3/up/lora_kernel_b", (None, "model")),
        ("decoder_block_3/up/kernel", (None, "model")),
        ("decoder_block_3/down/kernel", ("model", None)),
        ("decoder_block_3/up/kernel_scale", ("model",)),
        ("decoder_block_3/down/weight", (None, "model")),
        ("decoder_block_3/down/kernel_scale", None),
        ("decoder_block_3/mlp_norm/scale", None),
        ("final_norm/scale", None),
    ],
)
def test_layout_of_each_kind_of_variable(path, axes):
    assert axes_of(VaultGemmaBackbone.get_layout_map(mesh(2, 4)), path) == axes


@needs_jax
def test_four_heads_on_eight_devices_stay_whole_and_the_rest_is_divided():
    message = (
        r"The 8 devices of the mesh's axis 'model' do not divide num_key_value_heads=4, so each of them holds all of "
        "attention. The rest is sharded."
    )
    with pytest.warns(UserWarning, match=message):
        layout_map = VaultGemmaBackbone.get_layout_map(mesh(1, 8))
    divided = {
        weight.path
        for weight in weight_map.weight_map(ONE_B)
        if layout_map[weight.path] is not None
    }
    assert divided == {"token_embedding/embeddings"} | {
        f"decoder_block_{i}/{name}/weight" for i in range(26) for name in ("gate", "up", "down")
    }


@needs_jax
@pytest.mark.parametrize(
    "devices, whole",
    [(1, ""), (2, ""), (3, "attention and the embedding"), (5, "attention and the MLP")],
)
def test_whatever_is_divided_is_divided_evenly(devices, whole, recwarn):
    layout_map = VaultGemmaBackbone.get_layout_map(mesh(1, devices))
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == bool(whole) and all(
        f"holds all of {whole}. The rest" in text for text in messages
    )
    for weight in weight_map.weight_map(ONE_B):
        for axis, size in zip(axes_of(layout_map, weight.path) or (), weight.shape, strict=False):
            assert axis is None or size % devices == 0, weight.path


@needs_jax
def test_sizes_are_those_of_the_model_that_is_asked_for():
    grouped = VaultGemmaBackbone.get_layout_map(
        mesh(1, 2), num_query_heads=8, num_key_value_heads=2
    )
    assert axes_of(grouped, "decoder_block_0/attention/key/weight") == ("model", None)
    with pytest.warns(UserWarning, match="num_key_value_heads=2, so"):
        grouped = VaultGemmaBackbone.get_layout_map(
            mesh(1, 4), num_query_heads=8, num_key_value_heads=2
        )
    assert axes_of(grouped, "decoder_block_0/attention/query/weight") is None
    with pytest.warns(
        UserWarning, match="do not divide num_key_value_heads=4, vocabulary_size=4096, so"
    ):
        VaultGemmaBackbone.get_layout_map(
            mesh(1, 3), preset="vaultgemma_tiny", intermediate_dim=513
        )


@needs_jax
def test_axes_may_have_other_names():
    layout_map = VaultGemmaBackbone.get_layout_map(
        mesh(2, 2, axes=("tensor", "data")), "tensor", "data"
    )
    assert axes_of(layout_map, "decoder_block_0/down/weight") == (None, "tensor")


@needs_jax
@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("cpu",), {}, "`device_mesh` must be a keras.distribution.DeviceMesh. Received: 'cpu'"),
        (
            (mesh(2, 2), "tensor"),
            {},
            r"`model_parallel_dim_name` must be one of the mesh's axes \('batch', 'model'\). Received: model_parallel_dim_name='tensor'",
        ),
        (
            (mesh(2, 2), "model", "data"),
            {},
            r"`data_parallel_dim_name` must be one of .*data_parallel_dim_name='data'",
        ),
        (
            (mesh(2, 2), "model", "model"),
            {},
            "must be two axes of the mesh. Received: 'model' for both",
        ),
        ((mesh(2, 2),), dict(heads=3), "VaultGemmaBackbone has no argument .?heads"),
        ((mesh(2, 2),), dict(preset="vaultgemma_2b"), "`preset` must be a bundled preset"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        VaultGemmaBackbone.get_layout_map(*arguments, **options)


@needs_jax
@pytest.mark.parametrize("rows, batch_size", [(10, 4), (8, 2), (34, None), (6, 8)])
def test_batches_that_cannot_be_divided_are_refused_before_training(model, rows, batch_size):
    x = {"token_ids": np.ones((rows, 5), "int32"), "padding_mask": np.ones((rows, 5), "int32")}
    message = (
        f"must have a multiple of 4 rows.* Received: batch_size={batch_size or 32} and {rows} rows"
    )
    with keras.distribution.DataParallel(device_mesh=mesh(4, axes=("batch",))).scope():
        for call in (
            lambda: model.fit(x, x["token_ids"], batch_size=batch_size),
            lambda: model.evaluate(x, x["token_ids"], batch_size=batch_size),
            lambda: model.predict(x, batch_size=batch_size),
        ):
            with pytest.raises(ValueError, match=message):
                call()


@needs_jax
def test_batches_of_validation_data_are_checked_too(model):
    x = np.ones((10, 5), "int32")
    data, more = {"token_ids": x[:8], "padding_mask": x[:8]}, {"token_ids": x, "padding_mask": x}
    with keras.distribution.DataParallel(device_mesh=mesh(4, axes=("batch",))).scope():
        assert check_batches(data, 4) is None
        with pytest.raises(ValueError, match="Received: batch_size=8 and 10 rows"):
            model.fit(data, x[:8], batch_size=4, validation_data=(more, x), validation_batch_size=8)


@pytest.mark.skipif(ON_JAX, reason="JAX distributes")
def test_other_backends_say_that_they_would_ignore_it():
    name = keras.config.backend()
    with pytest.raises(
        ValueError, match=f"distributed on the JAX backend only.* Received: KERAS_BACKEND='{name}'"
    ):
        VaultGemmaBackbone.get_layout_map(mesh(1, 1))


def test_no_variable_has_two_layouts():
    """Keras refuses a path that matches two patterns, but only when the variable is made."""
    patterns = keras.distribution.LayoutMap(None)
    for pattern, axes in variable_axes("model").items():
        patterns[pattern] = axes
    for weight in weight_map.weight_map(ONE_B):
        layer, _, name = weight.path.rpartition("/")
        for suffix in (name, f"{name}_scale", f"lora_{name}_a", f"lora_{name}_b"):
            _ = patterns[f"{layer}/{suffix}"]


def work(folder, cases, devices, processes=1):
    """`{case: {quantity: array}}` from one worker process, or several that work together, each with some devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # Less optimisation: most of the time goes into compiling.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    path = os.pathsep.join([str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path}
    environment["KERAS_VAULTGEMMA_HOME"] = str(folder / "home")
    if processes > 1:
        environment |= {
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
            "KERAS_DISTRIBUTION_NUM_PROCESSES": str(processes),
        }
    command = [sys.executable, str(WORKER), str(folder / "results.npz"), *cases]
    logs = [folder / f"{i}.log" for i in range(processes)]
    workers = []
    try:
        for i, log in enumerate(logs):
            environment["KERAS_DISTRIBUTION_PROCESS_ID"] = str(i)
            workers.append(subprocess.Popen(command, env=environment, stderr=log.open("w")))
        codes = [worker.wait(timeout=900) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0] * processes, "\n".join(log.read_text()[-3000:] for log in logs)
    results = {}
    for name, value in np.load(folder / "results.npz").items():
        case, _, quantity = name.partition("/")
        results.setdefault(case, {})[quantity] = value
    return results


@pytest.fixture(scope="module")
def is_long(request):
    return "not long" not in request.config.option.markexpr


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, is_long):
    alone = [f"1:{task}" for task in (*TASK_MESHES, "lora", "sums", "private")]
    found = alone + tasks(TASK_MESHES) + tasks(LONG_TASK_MESHES) * is_long
    found += tasks(PRIVATE_MESHES) + tasks(LONG_PRIVATE_MESHES) * is_long
    return work(tmp_path_factory.mktemp("one"), found, devices=8)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, is_long):
    """Results of two processes that work together, and the folder of their files."""
    found = PROCESS_TASKS + PRIVATE_PROCESS_TASKS
    found += (LONG_PROCESS_TASKS + LONG_PRIVATE_PROCESS_TASKS) * is_long
    folder = tmp_path_factory.mktemp("two")
    return work(folder, found, devices=2, processes=2), folder


def assert_equal_to_one_device(results, case, alone):
    found, expected = results[case], alone[f"1:{case.partition(':')[2]}"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.startswith("layout/"):
            np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


@needs_jax
@pytest.mark.parametrize("case", cases(tasks(TASK_MESHES), tasks(LONG_TASK_MESHES)))
def test_results_equal_those_of_one_device(one_process, case):
    assert np.abs(one_process["1:full"]["gradient/token_embedding/embeddings"]).max() > 0.01
    assert_equal_to_one_device(one_process, case, one_process)


@needs_jax
@pytest.mark.parametrize("case", cases(PROCESS_TASKS, LONG_PROCESS_TASKS))
def test_two_processes_equal_one_device(one_process, two_processes, case):
    assert_equal_to_one_device(two_processes[0], case, one_process)


@needs_jax
@pytest.mark.parametrize(
    "mesh, seen", [("1", [8, 7]), ("4", [2, 7]), ("2x4", [4, 7]), ("1x2", [8, 7])]
)
def test_each_device_computes_the_rows_that_it_has(one_process, mesh, seen):
    assert one_process[f"{mesh}:shares"]["layout/seen"].tolist() == seen


@needs_jax
def test_weights_are_loaded_in_parts(one_process):
    layouts = one_process["2x4:full"]
    assert layouts["layout/token_embedding/embeddings"] == "('model', None)"
    assert layouts["layout/decoder_block_0/attention/value/weight"] == "('model', None)"
    assert layouts["layout/decoder_block_0/down/weight"] == "(None, 'model')"
    assert layouts["layout/final_norm/scale"] == "(None,)"


@needs_jax
def test_what_an_adapter_is_merged_into_stays_divided(one_process):
    found = one_process["2x2:loaded"]
    assert found["loss"][1] < found["loss"][0]
    assert found["layout/token_embedding/embeddings"] == "('model', None)"
    assert found["layout/decoder_block_0/up/weight"] == "('model', None)"
    assert found["layout/decoder_block_0/attention/attention_output/weight"] == "(None, 'model')"


@needs_jax
def test_lora_factors_int8_scales_and_optimizer_state_are_divided(one_process):
    layouts = one_process["2x2:qlora"]
    block = "decoder_block_0"
    assert layouts[f"layout/{block}/up/kernel_scale"] == "('model',)"
    assert layouts["layout/token_embedding/embeddings_scale"] == "('model',)"
    for path, axes in {
        f"{block}/up/lora_kernel_a": "(None, None)",
        f"{block}/up/lora_kernel_b": "(None, 'model')",
        f"{block}/attention/attention_output/lora_kernel_a": "('model', None)",
        "token_embedding/lora_embeddings_a": "('model', None)",
    }.items():
        assert layouts[f"layout/{path}"] == axes
        for slot in ("momentum", "velocity", "gradient_accumulator"):
            assert layouts[f"layout/adam/{path.replace('/', '_')}_{slot}"] == axes


@needs_jax
@pytest.mark.parametrize("mesh", of_task("sums", PRIVATE_MESHES, LONG_PRIVATE_MESHES))
def test_clipped_sums_equal_those_of_one_device(one_process, mesh):
    alone, found = (one_process[f"{name}:sums"] for name in ("1", mesh))
    assert found.keys() == alone.keys()
    assert alone["full/clipped"] == 7 and 0 < alone["lora/clipped"] < 6
    for name, parts in (("full", ["gradients"]), ("lora", ["gradients", "rests"])):
        paths = [path for path in alone if path.startswith(f"{name}/gradients/")]
        expected, sums = (
            np.concatenate(
                [
                    sum(
                        of[p.replace("gradients", part)].astype("float64") for part in parts
                    ).ravel()
                    for p in paths
                ]
            )
            for of in (alone, found)
        )
        assert np.linalg.norm(sums - expected) < 1e-5 * np.linalg.norm(expected)
        for statistic in ("loss", "clipped", "not_finite", "sensitivity"):
            np.testing.assert_allclose(
                found[f"{name}/{statistic}"], alone[f"{name}/{statistic}"], rtol=1e-5
            )


@needs_jax
@pytest.mark.parametrize("mesh", of_task("private", PRIVATE_MESHES, LONG_PRIVATE_MESHES))
def test_private_training_equals_that_on_one_device(one_process, mesh):
    assert_equal_to_one_device(one_process, f"{mesh}:private", one_process)


@needs_jax
@pytest.mark.parametrize("mesh", ["1", *of_task("private", PRIVATE_MESHES, LONG_PRIVATE_MESHES)])
def test_noise_is_drawn_once(one_process, mesh):
    found = one_process[f"{mesh}:private"]
    assert found["noise"].std() == pytest.approx(1.0 / 4 * 4**0.5, rel=0.15)
    np.testing.assert_allclose(found["layout/error of noise"], 0, atol=1e-5)


@needs_jax
@pytest.mark.long
def test_private_training_resumes_on_several_devices(one_process):
    alone, found = one_process["1:private"], one_process["2:resumed"]
    assert found.pop("steps").tolist() == [4, 1]  # the interrupted step counts twice
    for name, value in found.items():
        np.testing.assert_allclose(value, alone[name], atol=1e-5)


@needs_jax
@pytest.mark.parametrize("mesh", ["4", pytest.param("2x2", marks=pytest.mark.long)])
def test_private_training_in_two_processes(one_process, two_processes, mesh):
    two, _ = two_processes
    for name, value in one_process["1:private"].items():
        if not name.startswith("layout/"):
            np.testing.assert_allclose(two[f"{mesh}:private"][name], value, atol=1e-5)
    np.testing.assert_allclose(two[f"{mesh}:private"]["layout/error of noise"], 0, atol=1e-5)
    assert (two[f"{mesh}:private"]["layout/difference"] == 0).all()


@needs_jax
def test_the_first_process_plans_and_writes_and_all_know_the_run(two_processes):
    two, folder = two_processes
    found = two["4:ledger"]
    assert (found["names"][0] == found["names"][1]).all()
    assert found["steps"].ravel().tolist() == [2, 2] and found["machine"].tolist() == [2]
    assert (folder / "results.npz.0").exists() and not (folder / "results.npz.1").exists()
    assert "each process must be given all rows" in str(found["error"])
