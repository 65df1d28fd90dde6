"""The context of a worker process: settings, services, engine, and what its threads share."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.db import Database
from shared.jobs import Holder
from shared.jobs.retry import RetryPolicy
from shared.settings import Settings
from shared.storage import Storage
from workers.active_jobs import ActiveJobs
from workers.engines.protocol import Engine
from workers.pending_writes import PendingWrites
from workers.pixel_budget import PixelBudget


@dataclass(frozen=True, kw_only=True)
class PipelineContext:
    """What turns a job's inputs into its result. Enough for a replay, which has no lease."""

    settings: Settings
    storage: Storage
    engine: Engine
    pixel_budget: PixelBudget = field(default_factory=PixelBudget)


@dataclass(frozen=True, kw_only=True)
class WorkerContext(PipelineContext):
    """What a worker process acquires, runs, publishes and records jobs with."""

    db: Database
    # Connections for heartbeats and reaping, which the job threads cannot use up.
    maintenance_db: Database
    holder: Holder
    retry_policy: RetryPolicy
    active_jobs: ActiveJobs = field(default_factory=ActiveJobs)
    pending_writes: PendingWrites = field(default_factory=PendingWrites)
