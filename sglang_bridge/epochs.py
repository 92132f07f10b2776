"""Weight epochs: which weights computed a row.

The epoch rises when a weight update begins, whether it succeeds or not: from then on the
weights are not what they were. Updates come in many calls (one a bucket), and an epoch
that no forward ran under names nothing, so the number only rises when there was one.
"""

from __future__ import annotations

_LABELS_KEPT = 1024
# A record has room for several runs of weight versions, each with its label.
LABEL_CHARACTERS = 64


class WeightEpochs:
    """Counts epochs and keeps the labels of the latest ones. Written by the scheduler thread."""

    def __init__(self, first_label: str | None = None) -> None:
        self.current = 0
        self._used = False
        self._labels: dict[int, str] = {0: first_label[:LABEL_CHARACTERS]} if first_label else {}

    def mark_used(self) -> int:
        """A forward runs now; returns the epoch that it runs under."""
        self._used = True
        return self.current

    def begin_update(self, label: str | None) -> None:
        """Weights begin to change; ``label`` is the version given with the update, if any."""
        if self._used:
            self.current += 1
            self._used = False
            self._labels.pop(self.current - _LABELS_KEPT, None)
        if label:
            self._labels[self.current] = label[:LABEL_CHARACTERS]

    def label(self, epoch: int) -> str:
        """The version given for an epoch, else ``epoch-N``."""
        return self._labels.get(epoch, f"epoch-{epoch}")
