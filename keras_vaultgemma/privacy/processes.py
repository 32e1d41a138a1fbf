"""Several processes that train one model privately: one of them plans, and all do the same steps.

The first process reads and writes the ledgers, plans the run and draws its secret. The others get
the plan, the secret and the history from it, over the network that also carries gradients of single
devices without noise, and keep the run in memory. Whoever reads this network is not protected
against. No step releases anything before the first process has counted it, because every
step needs the gradients on that process's devices.
"""

import hashlib
import json

import keras
import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma.privacy.ledger import Run
from keras_vaultgemma.privacy.ledger_writer import OpenRun


def begin_together(begin, record, rows, settings):
    """Return what `begin()` returns in the first process, in all processes that train together.

    Args:
        begin: function without arguments that returns a tuple of an `OpenRun` and a dict of facts
            that JSON can hold. Only the first process calls it.
        record: `PrivacyRecord` of the model. All processes get that of the first one.
        rows: nested arrays, which must be equal in all processes.
        settings: dict, which must be equal as well.

    Raises:
        ValueError: If processes have other rows or settings, or the first one cannot begin.
    """
    if backend.process_count() == 1:
        return begin()
    if len({*backend.from_processes(_digest(rows, settings))}) > 1:
        raise ValueError(
            "In private training, each process must be given all rows and equal settings, because "
            "each step samples from all rows. (A `fit` without privacy is given a part of them.) "
            f"Received: other ones in {backend.process_count()} processes"
        )
    opened, content, error = None, {}, None
    if backend.is_first_process():
        try:
            opened, facts = begin()
            history = record.everything.lines().decode()
            content = {"run": opened.run._asdict(), "history": history, "facts": facts}
        except Exception as caught:  # the others wait for an answer
            content, error = {"error": str(caught)}, caught
    content = json.loads(backend.from_processes(json.dumps(content).encode())[0])
    if error is not None:
        raise error
    if "error" in content:
        raise ValueError(f"The first process could not begin the run. Received: {content['error']}")
    if opened is None:
        record.add_copied(content["history"].encode(), "the first process")
        run = Run(**content["run"])
        opened = OpenRun(None, run, record.everything, name=run.name)
    return opened, content["facts"]


def _digest(rows, settings):
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for array in map(np.asarray, keras.tree.flatten(rows)):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()
