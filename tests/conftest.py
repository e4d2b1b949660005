"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of small real samples (refer-mini, refer-coco128); tests that need it skip where there is none."""
    folder = os.environ.get("CMMASKSD_REAL_DATA")
    if not folder:
        pytest.skip("CMMASKSD_REAL_DATA is not set: give it the folder that has refer-mini and refer-coco128")
    return Path(folder)
