"""Settings that would break the promises of leases are refused."""

import pytest

from sps2_kv_directory.config import DirectoryConfig


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


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="redis://"):
        DirectoryConfig(redis="localhost:6379")
