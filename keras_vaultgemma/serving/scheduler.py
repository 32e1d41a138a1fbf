"""The thread that decodes: jobs wait in a queue, join the batch, and leave it when complete."""

import collections
import logging
import threading
import time

from keras_vaultgemma.generation.batch_loop import MAX_STEPS
from keras_vaultgemma.serving.errors import RequestError, unavailable

LOG = logging.getLogger(__name__)

SECONDS_BETWEEN_PIECES = 0.05
"""Time for which the batch is decoded before rows may join and leave, if a token takes less."""

PATIENCE = 1.0
"""Seconds that jobs of another model wait before no more of the present one join the batch."""


class Scheduler:
    """A thread that decodes the jobs of all clients.

    Jobs of the model whose adapter is active join the batch as soon as a row is free, in the order
    in which they came. Another model's jobs join when the batch is empty; once they have waited
    `PATIENCE`, no others join before them.

    Args:
        models: `Models`.
        max_rows: int. Largest number of jobs that are decoded together.
        max_queue: int. Largest number of jobs that wait.

    Attributes:
        batch: `ContinuousBatch`.
    """

    def __init__(self, models, max_rows, max_queue):
        self.models = models
        self.max_queue = max_queue
        self.batch = models.batch(max_rows)
        self._jobs = {}  # by row, those in the batch
        self._queue = collections.deque()
        self._changed = threading.Condition()
        self._closing = False
        self._seconds_per_step = SECONDS_BETWEEN_PIECES
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)

    def start(self):
        """Start the thread."""
        self._thread.start()

    def close(self):
        """End the thread, and with it all jobs."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self):
        """True if jobs are decoded."""
        return self._thread.is_alive()

    @property
    def load(self):
        """Tuple of the numbers of jobs in the batch and in the queue."""
        return len(self._jobs), len(self._queue)

    def submit(self, jobs):
        """Add jobs to the queue.

        Raises:
            RequestError: If there are more than the queue may hold.
        """
        with self._changed:
            if len(self._queue) + len(jobs) > self.max_queue:
                raise unavailable(f"The server is busy: {len(self._queue)} answers wait already")
            if self._closing:
                raise unavailable("The server is shutting down", "shutting_down")
            self._queue.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs):
        """End jobs whose answers nobody needs any longer, within a few decoding steps."""
        for job in jobs:
            job.is_cancelled = True
        with self._changed:
            self._changed.notify()

    def _run(self):
        while True:
            with self._changed:
                while not (self._queue or self._jobs or self._closing):
                    self._changed.wait()
                if self._closing:
                    break
            try:
                self._drop_cancelled()
                self._admit()
                self._decode()
            except Exception as error:
                LOG.exception("Decoding failed")
                self._fail(error)
        self._fail(unavailable("The server is shutting down", "shutting_down"))

    def _drop_cancelled(self):
        with self._changed:
            if any(job.is_cancelled for job in self._queue):
                self._queue = collections.deque(j for j in self._queue if not j.is_cancelled)
        for row, job in list(self._jobs.items()):
            if job.is_cancelled:
                self.batch.remove(row)
                del self._jobs[row]

    def _admit(self):
        joining = self._next_jobs()
        self._jobs.update({job.row: job for job in joining})
        for job in joining:
            if job.scores_prompt:
                job.prompt_scores = self.models.score_prompt(job.row.prompt)
            if job.row.limit == 0:  # nothing but the prompt is asked for
                job.take([], [], [])
                del self._jobs[job.row]
        self.batch.add([job.row for job in joining if job.row in self._jobs])

    def _next_jobs(self):
        """Take the jobs that join the batch out of the queue."""
        with self._changed:
            if not self._queue:
                return []
            if not self._jobs:
                self.models.use(self._queue[0].model)
            present = self.models.active
            others = (job for job in self._queue if job.model != present)
            waits_longest = next(others, None)
            if self._jobs and waits_longest and time.monotonic() - waits_longest.since > PATIENCE:
                return []
            joining = [job for job in self._queue if job.model == present][: self.batch.free]
            chosen = set(joining)
            self._queue = collections.deque(j for j in self._queue if j not in chosen)
            return joining

    def _decode(self):
        start = time.monotonic()
        steps = max(1, min(MAX_STEPS, int(SECONDS_BETWEEN_PIECES / self._seconds_per_step)))
        found = self.batch.step(steps)
        if not found:
            return
        taken = max(len(tokens) for _, tokens, _, _ in found)
        seconds = (time.monotonic() - start) / max(taken, 1)
        # Averaged, because the first step of a size includes compilation.
        self._seconds_per_step += 0.3 * (min(seconds, 1.0) - self._seconds_per_step)
        for row, *new in found:
            if self._jobs[row].take(*new):
                self.batch.remove(row)
                del self._jobs[row]

    def _fail(self, error):
        """End all jobs with an error, and empty the batch, whose cache may be lost."""
        if not isinstance(error, RequestError):
            error = RequestError(500, f"Decoding failed: {type(error).__name__}")
        with self._changed:
            jobs = [*self._jobs.values(), *self._queue]
            self._jobs, self._queue = {}, collections.deque()
        for job in jobs:
            job.deliver(error)
        self.batch.clear()
