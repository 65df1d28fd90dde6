"""Which leases their workers have stopped renewing, by this process's monotonic clock."""

from __future__ import annotations

from collections.abc import Sequence

from shared.jobs import FencingToken, RunningLease


class LeaseWatch:
    """Measures how long each lease was watched without a renewal.

    That a lease has expired by the database's clock does not show that its worker is lost: the
    clock jumps when a laptop wakes up or NTP corrects it, and while the database is unavailable
    nobody can renew. Live workers renew several times within the time that is watched here.
    """

    def __init__(self, *, lease_seconds: float, max_gap_seconds: float) -> None:
        """max_gap_seconds: what counts at most between two observations.

        A longer gap was a suspension or an outage, in which workers may have been unable to renew.
        """
        self._lease_seconds = lease_seconds
        self._max_gap_seconds = max_gap_seconds
        self._watched: dict[RunningLease, float] = {}
        self._last = 0.0

    def abandoned(self, leases: Sequence[RunningLease], now: float) -> list[FencingToken]:
        """Note these leases; return those that were not renewed for as long as a lease lasts.

        now: monotonic, in seconds.
        """
        gap, self._last = min(now - self._last, self._max_gap_seconds), now
        watched = self._watched
        self._watched = {
            lease: watched[lease] + gap if lease in watched else 0.0 for lease in leases
        }
        return [
            lease.token
            for lease, seconds in self._watched.items()
            if seconds >= self._lease_seconds
        ]
