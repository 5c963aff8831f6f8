"""The event loops of the web tests: asyncio's and uvloop's, both on a virtual clock."""

import pytest

from tests.web.fake_loop import FakeAsyncioLoop, FakeUvloop
from tests.web.harness import Runner

LOOPS = {"asyncio": FakeAsyncioLoop, "uvloop": FakeUvloop}


@pytest.fixture(params=sorted(LOOPS))
def run(request: pytest.FixtureRequest) -> Runner:
    """Runs a test on asyncio's loop and on uvloop, which users get."""
    return Runner(LOOPS[request.param])
