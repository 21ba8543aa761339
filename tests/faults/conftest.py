"""A deployment that cases share for as long as nothing is left behind in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import start_or_skip
from tests.faults.cluster import Cluster, Options

Deploy = Callable[..., Cluster]


class Standing:
    """The one deployment that stands. Another kind of one takes its place, and so does a clean one."""

    def __init__(self) -> None:
        self._cluster: Cluster | None = None

    def get(self, options: Options) -> Cluster:
        if self._cluster and (self._cluster.options != options or not self._cluster.clean):
            self.end()
        if self._cluster is None:
            self._cluster = start_or_skip(lambda: started(options))
        self._cluster.clean = False  # Until its case has found that it is.
        return self._cluster

    def end(self) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster:
            cluster.stop()


def started(options: Options) -> Cluster:
    cluster = Cluster(options)
    try:
        cluster.start()
    except BaseException:
        cluster.stop()
        raise
    return cluster


@pytest.fixture(scope="session")
def standing() -> Iterator[Standing]:
    made = Standing()
    yield made
    made.end()


@pytest.fixture
def deploy(standing: Standing) -> Deploy:
    """A deployment of that kind, with whatever earlier cases have put into it."""
    return lambda **options: standing.get(Options(**options))
