"""Rows grouped by the person they belong to, for private training with `DPSGD(unit="user")`.

A sampled user contributes at most k = `max_rows_per_group` rows to a step. Of more rows, k are
drawn uniformly without replacement, afresh in each step that samples the user, so that all of them
are trained on in time. The draw depends on the user's own rows and on bits of the run's secret that
no other user and no other step has; the guarantee therefore holds for every value of these bits.
"""

import numbers

import numpy as np

from keras_vaultgemma.data.containers import as_list
from keras_vaultgemma.privacy.fingerprint import fingerprint
from keras_vaultgemma.privacy.sampling import random_bits


class Groups:
    """Partition of the rows of a dataset into users.

    Args:
        labels: list of N strings, as `group_labels` returns them. Equal labels are one user.
        max_rows: int. k, the number of rows that a user contributes to a step at most.

    Attributes:
        max_rows: int. k.
        sizes: int array of shape `[U]`. Number of rows of each user.
    """

    def __init__(self, labels, max_rows):
        numbers_of = {}
        users = np.array([numbers_of.setdefault(label, len(numbers_of)) for label in labels])
        self.max_rows, self.sizes = max_rows, np.bincount(users)
        self._rows = np.argsort(users, kind="stable")
        self._ends = np.cumsum(self.sizes)

    def __len__(self):
        """Number of users."""
        return len(self.sizes)

    def rows(self, user):
        """Return the indices of a user's rows, in increasing order."""
        return self._rows[self._ends[user] - self.sizes[user] : self._ends[user]]

    def select(self, secret, step, users):
        """Return the rows that users contribute to a step.

        Args:
            secret: bytes of length 16. Secret of one call of `fit`.
            step: int, 0 or more.
            users: int array of shape `[n]`. The users that the step samples.

        Returns:
            Tuple `(rows, is_drawn)` of arrays of shape `[n, k]`: indices of rows, and False where a
            row only fills the shape. It is one of the user's own rows, repeated, because a row of
            zeros may be no valid input.
        """
        rows = np.zeros((len(users), self.max_rows), "int64")
        is_drawn = np.zeros(rows.shape, bool)
        for i, user in enumerate(users):
            own = self.rows(user)
            if len(own) > self.max_rows:
                keys = random_bits(secret, "rows of a user", step, int(user), len(own))
                own = own[np.sort(np.argsort(keys, kind="stable")[: self.max_rows])]
            rows[i], rows[i, : len(own)] = own[0], own
            is_drawn[i, : len(own)] = True
        return rows, is_drawn

    def fingerprint(self, records, key):
        """Return the fingerprint of the records' grouping, which ignores labels and order.

        Args:
            records: list of N str, bytes or integer arrays.
            key: bytes of length 32.

        Returns:
            str, as `fingerprint.fingerprint` returns it.
        """
        users = ([records[i] for i in self.rows(user)] for user in range(len(self)))
        return fingerprint((fingerprint(own, key) for own in users), key)


def group_labels(groups, count):
    """Return the label of each row's user as text.

    Labels are compared as text without surrounding white space: 7, "7" and " 7" are one user. To
    take two users for one protects both; to take one user for two would not.

    Args:
        groups: list, array, tensor or column of strings or integers, of length N.
        count: int. N, the number of rows.

    Returns:
        List of N strings.

    Raises:
        ValueError: If the length is another one, or a label is missing (None, NaN or blank) or no
            string or integer.

    Example:

    ```python
    from keras_vaultgemma.privacy.groups import group_labels

    assert group_labels([7, "7 ", "8"], count=3) == ["7", "7", "8"]
    ```
    """
    groups = as_list(groups)
    groups = groups.tolist() if hasattr(groups, "tolist") else groups
    if not isinstance(groups, (list, tuple)):
        raise ValueError(
            "`groups` must be a list or array with one label per row. "
            f"Received: {type(groups).__name__}"
        )
    if len(groups) != count:
        raise ValueError(
            f"`groups` must have one label per row, {count:,}. Received: {len(groups):,} labels"
        )
    labels = [label_text(label) for label in groups]
    if None in labels:
        row = labels.index(None)
        raise ValueError(
            "`groups` must have a string or an integer for every row, because a row without a user "
            f"cannot be protected as a part of one. Received: {groups[row]!r} in row {row}"
        )
    return labels


def label_text(label):
    """Return a label as text, or None if it is missing or no label."""
    if isinstance(label, bytes):
        label = label.decode("utf-8", "surrogateescape")
    if isinstance(label, numbers.Integral) and not isinstance(label, bool):
        label = str(int(label))
    return (label.strip() or None) if isinstance(label, str) else None
