"""Runs that several tests write to ledgers."""

from keras_vaultgemma.privacy.ledger import Run, read_ledger

DATA, OTHER_DATA, OTHER_KEY = "aaaaaaaa:01", "aaaaaaaa:02", "bbbbbbbb:03"


def a_run(**changes):
    return Run(
        **{
            **dict(
                rows=1000,
                sampling_probability=0.05,
                max_batch_size=80,
                noise_multiplier=1.0,
                clip_norm=1.0,
            ),
            **dict(
                delta=1e-5, planned_steps=50, unit="one row of at most 256 tokens", dataset=DATA
            ),
            **dict(package_version="0.1.0"),
            **changes,
        }
    )


def counts(path):
    return [count for _, count in read_ledger(path).runs]


def release_steps(path, run, steps, released):
    """Release steps, and append the file's length after each of them to `released`."""
    for _ in range(steps):
        run.release()
        released.append(path.stat().st_size)
