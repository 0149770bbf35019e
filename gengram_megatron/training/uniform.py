"""Whether a run predicts bases better than a guess with equal chances, and a warning if not."""

import math
from collections import deque
from statistics import fmean, median

from gengram_megatron.config.schema import Config

UNIFORM = math.log(4)
"""Loss, in nats a base, of a model that gives A, C, G and T a quarter each."""
WATCHED_STEPS = 100
"""Steps after warm-up before a run is judged, and the most that are judged at a time."""
FEWEST_STEPS = 40
"""A job that ends with fewer steps after warm-up is not judged at all."""
STANDARD_ERRORS = 3.0


class UniformCheck:
    """Looks at the training losses of one job after warm-up.

    A run is above uniform if the losses of the second half of its steps after warm-up (of at most
    the last 100) have a median more than three standard errors above ln 4, and the last fifth of
    them lies above ln 4 too. A median does not move when a few losses leap, so neither noise nor a
    passing spike raises the warning, nor a loss that has just come down. Losses that are not
    finite are left out.

    Args:
        config: of the run.
        samples: of the whole run; warm-up is a share of them.
    """

    def __init__(self, config: Config, samples: int):
        self._config = config
        warm_up = config.optimizer.warmup_fraction * samples
        self._warm_up_steps = math.ceil(warm_up / config.train.global_batch_size)
        self._losses: deque[float] = deque(maxlen=WATCHED_STEPS)
        self._seen = 0
        self._warned = False

    def after_step(self, step: int, loss: float) -> str | None:
        """A warning the first time that the run is found above uniform.

        step: steps done since the start of the run, this one included; loss: nats a base.
        """
        if step <= self._warm_up_steps or not math.isfinite(loss):
            return None
        self._seen += 1
        self._losses.append(loss)
        if self._warned or self._seen < WATCHED_STEPS or not self._above():
            return None
        self._warned = True
        return self._sentence(f"step {step}: the training loss")

    def at_end(self) -> str | None:
        """A warning if the job ends above uniform, also if it was too short to be judged before."""
        if self._seen < FEWEST_STEPS or not self._above():
            return None
        return self._sentence("this job ends with a training loss that")

    def _judged(self) -> list[float]:
        """The losses of the second half of the steps after warm-up, at most the last 100."""
        return list(self._losses)[-(self._seen // 2) :]

    def _above(self) -> bool:
        losses = self._judged()
        middle = median(losses)
        # Of normally distributed losses, standard deviation = 1.4826 x median deviation, and the
        # standard error of a median = 1.2533 x standard deviation / sqrt(n).
        deviation = 1.4826 * median(abs(loss - middle) for loss in losses)
        error = 1.2533 * deviation / math.sqrt(len(losses))
        last = losses[-(len(losses) // 5) :]
        return middle - STANDARD_ERRORS * error > UNIFORM and fmean(last) > UNIFORM

    def _sentence(self, what: str) -> str:
        optimizer, model = self._config.optimizer, self._config.model
        data = self._config.data.path or "FOLDER"
        return (
            f"{what} is {median(self._judged()):.4f} nats a base, which is above {UNIFORM:.4f}, "
            "the loss of a guess with equal chances for A, C, G and T: the model has learned "
            "nothing of DNA yet. "
            f"Look at optimizer.lr ({optimizer.lr:g}), model.init_std ({model.init_std:g}) and "
            f"train.precision ({self._config.train.precision}), at the share of N in the data "
            f"(gengram-data inspect {data}) and at its token ids (gengram-data verify {data}, "
            "model.gengram.token_ids)"
        )
