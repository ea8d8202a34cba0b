"""Every kernel key compiles for sm_90: no spills, no serialised wgmma, wgmma where prefill needs it."""

import pytest

from support.compiled_keys import assert_fits, compiled_keys
from support.must_show import MustShow

pytestmark = pytest.mark.acceptance


def test_every_key_compiles(must_show: MustShow) -> None:
    with must_show("6 kernels: every key compiles for sm_90") as figures:
        listing = compiled_keys("", timeout_s=1800)
        for key in listing:
            assert_fits(key)
        registers = max(key["registers"] for key in listing)
        shared_kib = max(key["shared_bytes"] for key in listing) / 1024
        with_wgmma = sum(key["wgmma"] > 0 for key in listing)
        figures.append(f"{len(listing)} keys, 0 spills, {with_wgmma} with wgmma")
        figures.append(f"at most {registers} registers, {shared_kib:.0f} KiB shared")
