"""What the cases of this folder have in common."""

from __future__ import annotations

import os
from typing import Final

import pytest

from tests.faults.children import exists
from tests.faults.cluster import RECEIPTS

CASE: Final = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(3_600)]

needs_receipts: Final = pytest.mark.xfail(
    not RECEIPTS, reason="takes receipts: without them the hot store's tail is lost with it", strict=False
)
large_only: Final = pytest.mark.skipif(not os.environ.get("FAULTS_N"), reason="make faults")


def needs_point(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not exists(name), reason=f"this product has no place for the failpoint {name}")
