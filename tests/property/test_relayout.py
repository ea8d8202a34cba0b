"""Relayout: every head of every token once, for any prefill mesh and any decode mesh."""

from hypothesis import given

from support.relayout_cases import Case, cases, check


@given(case=cases())
def test_every_head_of_every_token_goes_once_to_each_that_holds_it(case: Case) -> None:
    assert check(case) == 1.0
