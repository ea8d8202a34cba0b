"""Must show 7: a NIXL writer stopped past its lease and then continued changes no byte of any block."""

import pytest

from support.must_show import MustShow
from support.stopped_writer import stopped_writer

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

TRANSPORTS = {"shared memory": {}, "TCP": {"UCX_TLS": "tcp,self"}}


@pytest.mark.parametrize("way", TRANSPORTS)
def test_a_late_writer_changes_no_byte(way: str, must_show: MustShow) -> None:
    with must_show(f"7 a stopped NIXL writer goes on ({way})") as figures:
        seen = stopped_writer("nixl", env=TRANSPORTS[way])
        figures.append(f"{seen.changed_elements} elements of reused blocks changed")
        figures.append("the arena's digest is " + ("the same" if seen.arena_unchanged else "ANOTHER"))
        figures.append(f"{seen.late_bytes_in_ring} late bytes seen in its ring")
        figures.append(
            f"{seen.late_slabs_refused} late slabs refused, the writer is told {seen.writer_result}"
        )
        assert seen.changed_elements == 0
        assert seen.arena_unchanged
        assert seen.late_bytes_in_ring > 0
        assert seen.late_slabs_refused > 0
        assert seen.writer_result == "REFUSED"
