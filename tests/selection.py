"""Which cases of a test are run: all of them with --all, without it a choice of each kind."""

from collections.abc import Collection, Iterable

import pytest


def quick_or_thorough(cases: Iterable[str], quick: Collection[str]) -> list:
    """The cases as parameters of a test; those that are not `quick` only run with --all."""
    assert set(quick) <= set(cases)
    return [
        case if case in quick else pytest.param(case, marks=pytest.mark.thorough) for case in cases
    ]


def selected(request: pytest.FixtureRequest, argument: str) -> set[str]:
    """The values of an argument in the tests of this file that will run, so that a fixture which
    prepares all of them prepares no more."""
    items = [item for item in request.session.items if item.path == request.path]
    calls = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return {params[argument] for params in calls if argument in params}
