"""Checksums of files that are hashed while they are written."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import workers as followed
from data_prep.manifest import file_facts
from data_prep.workers import IncrementalSha256


@settings(deadline=None)  # the machine may be busy
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
    at_a_time=st.integers(1, 9),
)
def test_the_order_of_the_parts_does_not_matter(tmp_path_factory, sizes, order, at_a_time):
    path = tmp_path_factory.mktemp("followed") / "file"
    ends = np.cumsum(sizes).tolist()
    with path.open("wb") as file:
        file.truncate(ends[-1])
    text = bytes(order.randrange(256) for _ in range(ends[-1]))
    parts = list(enumerate(zip([0, *ends], ends)))
    order.shuffle(parts)
    with pytest.MonkeyPatch.context() as patch, IncrementalSha256(path, ends) as found:
        patch.setattr(followed, "AT_A_TIME", at_a_time)
        for number, (start, end) in parts:
            with path.open("r+b") as file:
                file.seek(start)
                file.write(text[start:end])
            found.written(number)
        facts = found.facts()
    assert path.read_bytes() == text
    assert facts == file_facts(path)


def test_what_is_complete_is_hashed_before_the_rest_is_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one" + bytes(6))
    with IncrementalSha256(path, [3, 6, 9]) as found:
        found.written(0)
        found.written(2)
        while found.hashed < 3:
            time.sleep(0.001)
        path.write_bytes(b"onetwosix")
        found.written(1)
        assert found.facts() == file_facts(path)
        assert found.hashed == 9


def test_an_error_does_not_wait_for_the_rest(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # would take minutes
    with pytest.raises(KeyboardInterrupt), IncrementalSha256(path, [1 << 40]) as found:
        found.written(0)
        raise KeyboardInterrupt
