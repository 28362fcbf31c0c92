"""Prefetching in a background thread."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_END: Any = object()


def prefetch(items: Iterator[T], n_ahead: int) -> Iterator[T]:
    """Iterate over `items`, fetching up to `n_ahead` of them ahead in a background thread.

    An error in fetching an item is raised when that item is due.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = deque(thread.submit(next, items, _END) for _ in range(n_ahead))
        while (item := ahead.popleft().result()) is not _END:
            ahead.append(thread.submit(next, items, _END))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
