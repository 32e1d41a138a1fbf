"""Memory that is freed goes back to the system."""

import subprocess
import sys

import pytest

RESIDENT = """
import re
import numpy as np
from keras_vaultgemma import backend

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

np.ones(2**24, "u1")  # freed: from here on, glibc takes blocks of that size from its heap
{call}
before = resident()
blocks = [np.ones(2**23, "u1") for _ in range(16)]
del blocks[:-1]
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is resident")
@pytest.mark.parametrize("call, megabytes", [("", range(100, 140)), ("backend.return_freed_memory()", range(12))])
def test_blocks_before_one_that_is_in_use(call, megabytes):
    done = subprocess.run([sys.executable, "-c", RESIDENT.format(call=call)], capture_output=True, check=True)
    assert int(done.stdout) in megabytes
