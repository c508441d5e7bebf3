"""Where objects are: what a lease may keep."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mlchaos_dagster.domain.environment import S3Location


@pytest.mark.parametrize(
    "endpoint", ["https://key:secret@s3.example", "https://key@s3.example", "https://s3.example/?k=v"]
)
def test_an_endpoint_carries_no_credentials(endpoint: str) -> None:
    with pytest.raises(ValidationError, match="carries a user name, a password or a query") as e:
        S3Location(endpoint=endpoint, bucket="b")
    assert e.value.error_count() == 1


@pytest.mark.parametrize("endpoint", ["{object_store}", "http://127.0.0.1:9000", "https://s3.example/path"])
def test_any_other_endpoint_is_one(endpoint: str) -> None:
    assert S3Location(endpoint=endpoint, bucket="b").endpoint == endpoint
