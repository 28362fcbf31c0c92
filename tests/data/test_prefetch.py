import threading
from collections.abc import Iterator

import pytest

from transcriptformer.data.prefetch import prefetch


@pytest.mark.parametrize("n_ahead", [1, 3, 100])
@pytest.mark.parametrize("n_items", [0, 1, 20])
def test_all_items_are_yielded_in_order(n_items: int, n_ahead: int) -> None:
    assert list(prefetch(iter(range(n_items)), n_ahead)) == list(range(n_items))


def test_items_are_fetched_ahead() -> None:
    fetched = [threading.Event() for _ in range(10)]

    def items() -> Iterator[int]:
        for i, event in enumerate(fetched):
            event.set()
            yield i

    ahead = prefetch(items(), 3)
    assert next(ahead) == 0
    assert fetched[3].wait(timeout=10)  # without being requested
    assert not fetched[5].wait(timeout=0.1)  # but no further
    assert list(ahead) == list(range(1, 10))


def test_an_error_is_raised_in_place_of_its_item() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise ValueError("third")

    ahead = prefetch(items(), 2)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(ahead)


def test_stopping_early_leaves_no_thread_behind() -> None:
    ahead = prefetch(iter(range(1000)), 2)
    next(ahead)
    ahead.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
