"""What all tiers share: a missing part skips with the sentence that says what to install; under CI it fails."""
import os

import pytest


def need(present: bool, sentence: str) -> None:
    """Skip the test unless a part of the machine is there. CI=true must have every part, so there it fails."""
    if not present:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(sentence)


@pytest.fixture(autouse=True, scope="session")
def no_worker_outlives_the_tests():
    yield
    from engines.workers import Worker
    Worker.close_all()
