"""What the cases of this folder have in common."""

from __future__ import annotations

import os
from typing import Final

import pytest

CASE: Final = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(3_600)]

large_only: Final = pytest.mark.skipif(not os.environ.get("FAULTS_N"), reason="make faults")
