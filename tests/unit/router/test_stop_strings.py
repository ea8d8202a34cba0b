"""Stop strings against a search of the whole text, however the text is cut."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sps2_router.stop_strings import StopFinder

STOPS = st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3)


def search(text: str, stops: list[str], first_end: int) -> str | None:
    """The text before the stop string that is complete first, at `first_end` characters or later."""
    for end in range(max(1, first_end), len(text) + 1):
        if whole := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, whole))]
    return None


@given(text=st.text("ab€", max_size=20), stops=STOPS, data=st.data())
def test_the_cuts_do_not_matter(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    ignored = data.draw(st.integers(0, 5))  # pieces in which no stop string counts
    finder, out, seen = StopFinder(stops), "", 0
    edges = [0, *cuts, len(text)]
    for number, (begin, end) in enumerate(pairwise(edges)):
        out += finder.push(text[begin:end], ends=number >= ignored)
        if number < ignored:
            seen = end
        assert text.startswith(out)
    expected = search(text, stops, seen + 1)
    assert finder.found == (expected is not None)
    assert out + finder.flush() == (text if expected is None else expected)


def test_nothing_is_held_longer_than_it_must() -> None:
    finder = StopFinder(["stop"])
    assert finder.push("a st") == "a "
    assert finder.push("a") == "sta"
    assert finder.push("sto") == ""
    assert finder.push("p it") == ""
    assert finder.found
    assert finder.push("more") == ""
    assert StopFinder([]).push("anything") == "anything"
