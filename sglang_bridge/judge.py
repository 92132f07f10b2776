"""What the tags say of a record: rows that are missing, weights that the others come from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shmroute import WeightRun
from shmroute.metadata import ranges_of, weight_runs

from .finished import Finished
from .tags import are_all_right, epochs_of, expected_places, wrong_rows

logger = logging.getLogger("shmroute")


class Verdict(NamedTuple):
    """Ranges of rows that must not be used, and the runs of weight versions."""

    missing: tuple[tuple[int, int], ...]
    versions: tuple[WeightRun, ...]

    @property
    def missing_rows(self) -> int:
        return sum(end - first for first, end in self.missing)


def judge(
    request: Finished,
    tags: npt.NDArray[np.int64],
    epoch: int,
    *,
    vocabulary: int,
    label: Callable[[int], str],
) -> Verdict:
    """Compare ``int64 [tokens]`` tags with the request's own tokens and positions.

    Parameters
    ----------
    epoch
        The weight epoch when the request finished; no row is of a later one.
    label
        The name of an epoch.

    Raises
    ------
    RuntimeError
        The request does not have as many token ids as rows.
    """
    places = expected_places(request.token_ids(), request.start, vocabulary)
    if len(places) != request.tokens:
        raise RuntimeError(f"{len(places)} token ids for {request.tokens} rows")
    if are_all_right(tags, places):
        return Verdict((), weight_runs(epochs_of(tags[:1], epoch), label))
    wrong = wrong_rows(tags, places)
    epochs = epochs_of(tags, epoch)
    if wrong.any():
        _say(request, wrong)
        epochs = _filled(epochs, wrong, epoch)
    return Verdict(ranges_of(wrong), weight_runs(epochs, label))


def _say(request: Finished, wrong: npt.NDArray[np.bool_]) -> None:
    logger.error(
        "shmroute: rid %r misses %d of %d rows: their KV locations hold other tokens' "
        "routes or none (first at token %d)",
        request.rid,
        int(wrong.sum()),
        request.tokens,
        request.start + int(np.argmax(wrong)),
    )


def _filled(
    epochs: npt.NDArray[np.int64], wrong: npt.NDArray[np.bool_], epoch: int
) -> npt.NDArray[np.int64]:
    """A missing row has no epoch of its own: it takes its predecessor's, or the first there is."""
    known = epochs[~wrong]
    if not len(known):
        return np.full(len(epochs), epoch)
    last_known = np.maximum.accumulate(np.where(wrong, -1, np.arange(len(epochs))))
    return np.where(last_known < 0, known[0], epochs[np.maximum(last_known, 0)])
