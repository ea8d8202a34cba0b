"""Must show 7: the decode kernels against fp64 for every key, and compiled for sm_90."""

from pathlib import Path

import pytest

from support.compiled_keys import assert_fits, compiled_keys
from support.kernel_suite import PAST_2_31, passed
from support.must_show import MustShow

pytestmark = pytest.mark.acceptance

COMPILE_TIMEOUT_S = 1_800
FILES = ("test_paged_decode.py", "test_merge_states.py", "test_rope_append.py")
KEYS = "^(paged_decode|merge_states|rope_append) "


def test_three_forms_agree(must_show: MustShow, repo_root: Path) -> None:
    with must_show("7 interpreter = CPU form = fp64 reference, three decode kernels") as figures:
        figures.append(f"{passed(repo_root, f'not {PAST_2_31}', FILES)} tests of {', '.join(FILES)}")


def test_an_index_past_2_31(must_show: MustShow, repo_root: Path) -> None:
    with must_show("7 an index past 2^31") as figures:
        figures.append(f"{passed(repo_root, PAST_2_31, FILES)} kernels read or write there")


def test_every_key_compiles(must_show: MustShow) -> None:
    with must_show("7 decode kernels: every key compiles for sm_90") as figures:
        listing = compiled_keys(KEYS, COMPILE_TIMEOUT_S)
        for key in listing:
            assert_fits(key)
        families = {key["name"].partition(" ")[0] for key in listing}
        assert families == {"paged_decode", "merge_states", "rope_append"}
        registers = max(key["registers"] for key in listing)
        figures.append(f"{len(listing)} keys, 0 spills, at most {registers} registers")
