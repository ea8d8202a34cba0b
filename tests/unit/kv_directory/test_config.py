"""Settings that would break the promises of leases are refused."""

from pathlib import Path

import pytest

from sps2_kv_directory.config import DirectoryConfig
from sps2_service.config import shown


def test_the_defaults_are_the_designs() -> None:
    config = DirectoryConfig()
    assert (config.lease_ttl_s, config.renew_interval_s, config.expire_interval_s) == (5.0, 1.0, 0.5)
    assert config.store.lease_ttl_s == 5.0
    assert config.store.max_clock_step_s == 2.0


@pytest.mark.parametrize(("renew", "expire", "timeout"), [(2.1, 0.5, 0.5), (1.0, 1.6, 0.5), (1.0, 0.5, 1.6)])
def test_what_would_end_the_leases_of_the_living_is_refused(
    renew: float, expire: float, timeout: float
) -> None:
    with pytest.raises(ValueError, match="of lease_ttl_s"):
        DirectoryConfig(renew_interval_s=renew, expire_interval_s=expire, store_timeout_s=timeout)


def test_the_password_comes_from_one_place_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2\n")
    assert DirectoryConfig(redis_password_file=file).read_redis_password() == "hunter2"
    assert DirectoryConfig(redis_password="open").read_redis_password() == "open"
    assert DirectoryConfig().read_redis_password() is None
    with pytest.raises(ValueError, match="not both"):
        DirectoryConfig(redis_password="open", redis_password_file=file)
    config = DirectoryConfig(redis="rediss://sps2:hunter2@redis:6380/0", redis_password="hunter2")
    assert shown(config)["redis"] == "rediss://sps2:***@redis:6380/0"
    assert "hunter2" not in str(shown(config))


@pytest.mark.parametrize("url", ["localhost:6379", "redis://u:hun/ter2@h"])
def test_a_url_that_is_none_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match="redis://") as caught:
        DirectoryConfig(redis=url)
    assert "hun" not in str(caught.value)
