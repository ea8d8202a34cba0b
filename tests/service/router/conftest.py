"""Fixtures of the router's tests."""

from collections.abc import AsyncIterator

import pytest

from support.router_deployment import Deployment


@pytest.fixture
async def up() -> AsyncIterator[Deployment]:
    async with Deployment() as deployment:
        yield deployment
        await deployment.assert_all_freed()
