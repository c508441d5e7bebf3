"""Rights that go with their namespace: what is refused there is gone, and nothing else is taken for gone."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from mlchaos_dagster.errors import DriverUnavailable
from mlchaos_dagster.kube.client import Cluster, DriverError, Forbidden, NotFound

POD = "/api/v1/namespaces/shop/pods/web"
PODS = "/api/v1/namespaces/shop/pods"


def cluster(namespace: DriverError | None) -> Cluster:
    """Everything in the namespace is refused; asked for the namespace itself, the server says this (None: it is there)."""

    def call(method: str, path: str, *_: Any) -> Any:
        if path != "/api/v1/namespaces/shop":
            raise Forbidden("not allowed", 403)
        if namespace is not None:
            raise namespace
        return Mock()

    found = Cluster.__new__(Cluster)
    found._call = call  # type: ignore[method-assign]
    return found


def test_in_a_namespace_that_is_gone_nothing_is_there() -> None:
    gone = cluster(NotFound("none", 404))
    assert gone.get(POD) is None
    assert gone.list(PODS) == []
    assert gone.delete(POD) is False
    with pytest.raises(NotFound, match="namespace shop is gone"):
        gone.patch(POD, {})


@pytest.mark.parametrize("answer", [None, Forbidden("not allowed", 403), DriverUnavailable("no answer")])
def test_where_the_namespace_stands_or_is_not_told_a_refusal_is_a_refusal(answer: DriverError | None) -> None:
    with pytest.raises(Forbidden):
        cluster(answer).get(POD)
    with pytest.raises(Forbidden):
        cluster(answer).list(PODS)
