"""A site per test; the pictures and their undisturbed results are made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.site import Catalog, Site, make_catalog
from tests.workers.fleet import Fleet


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("catalog").resolve())


@pytest.fixture
def site(catalog: Catalog, postgres_url: str, redis_url: str, tmp_path: Path) -> Iterator[Site]:
    """PostgreSQL, the session's Redis, local files."""
    fleet = Fleet(postgres_url, redis_url, tmp_path.resolve())
    yield Site(fleet=fleet, catalog=catalog)
    fleet.close()
