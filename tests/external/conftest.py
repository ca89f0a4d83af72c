"""RabbitMQ and ActiveMQ, each started once for all tests on it."""

import pytest
from brokers import EXTERNAL


@pytest.fixture(scope='session', params=EXTERNAL, ids=lambda kind: kind.name)
def broker(request, tmp_path_factory):
    if request.param.missing():
        pytest.skip(request.param.missing())
    with request.param(tmp_path_factory.mktemp('broker'), quick_start=True) as broker:
        yield broker
