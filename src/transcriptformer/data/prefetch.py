"""A thread that works ahead."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_END: Any = object()


def prefetch(items: Iterator[T], n_ahead: int) -> Iterator[T]:
    """The same items, of which a thread fetches up to `n_ahead` while earlier ones are being used.

    An error in fetching one is raised where that item would have come.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = deque(thread.submit(next, items, _END) for _ in range(n_ahead))
        while (item := ahead.popleft().result()) is not _END:
            ahead.append(thread.submit(next, items, _END))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
