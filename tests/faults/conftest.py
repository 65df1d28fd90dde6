"""Fixtures: one scenario per test; the images and their expected results are made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.scenario import Catalog, Scenario, make_catalog
from tests.workers.fleet import Fleet


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("catalog").resolve())


@pytest.fixture
def scenario(
    catalog: Catalog, postgres_url: str, redis_url: str, tmp_path: Path
) -> Iterator[Scenario]:
    """On PostgreSQL, the session's Redis and local files."""
    fleet = Fleet(postgres_url, redis_url, tmp_path.resolve())
    yield Scenario(fleet=fleet, catalog=catalog)
    fleet.close()
