"""Memory that is freed goes back to the system."""

import os
import subprocess
import sys

import pytest

from keras_vaultgemma import backend

RESIDENT = """
import re
import numpy as np
from keras_vaultgemma import backend

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
"""

LARGE_BLOCKS = """
np.ones(2**24, "u1")  # freed: from here on, glibc takes blocks of that size from its heap
{call}
before = resident()
blocks = [np.ones(2**23, "u1") for _ in range(16)]
del blocks[:-1]
print(resident() - before)
"""

SMALL_BLOCKS = """
import jax

backend.return_memory_of_compilations()
before = resident()
blocks = [np.ones(2**13, "u1") for _ in range(2**14)]
del blocks[:-1]
jax.monitoring.record_event_duration_secs("a stage of a compilation", {seconds})
print(resident() - before)
"""


ZEROS = """
from keras import ops

def count_up(most):
    state = (ops.zeros((), "int32"), backend.zeros((2**26,)))
    return ops.max(backend.while_loop(lambda i, _: i < most, lambda i, x: (i + 1, x + 1.0), state)[1])

compiled = backend.compile_function(count_up, [], fused=False)
before = resident()
assert float(compiled(ops.full((), 3, "int32"))) == 3
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is resident")
@pytest.mark.parametrize(
    "call, megabytes", [("", range(100, 140)), ("backend.return_freed_memory()", range(12))]
)
def test_blocks_before_one_that_is_in_use(call, megabytes):
    assert printed(RESIDENT + LARGE_BLOCKS.format(call=call)) in megabytes


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is resident")
@pytest.mark.skipif(backend.NAME != "jax", reason="JAX alone tells how long it compiled")
@pytest.mark.parametrize("seconds, megabytes", [(0.9, range(100, 140)), (1.1, range(12))])
def test_blocks_that_were_freed_before_a_long_compilation_ended(seconds, megabytes):
    assert printed(RESIDENT + SMALL_BLOCKS.format(seconds=seconds)) in megabytes


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is resident")
@pytest.mark.skipif(backend.NAME != "tensorflow", reason="TensorFlow alone makes constants of them")
def test_a_compiled_function_keeps_no_zeros():
    assert printed(RESIDENT + ZEROS) < 160


def printed(script):
    # TensorFlow with oneDNN keeps all memory it ever had.
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"}
    return int(
        subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, check=True
        ).stdout
    )
