"""Files behind http and https, and what such servers answer."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import requests
import urllib3

from transcriptformer.errors import DownloadError, one_line
from transcriptformer.fetching.fetcher import (
    CONNECT_TIMEOUT,
    READ_TIMEOUT,
    ChangedFileError,
    InterruptedDownloadError,
    Stat,
    may_pass,
)

TIMEOUT = (CONNECT_TIMEOUT, READ_TIMEOUT)

CHUNK = 2**20
"""Bytes that are taken at a time, or what is there."""


class HttpFile:
    """A file behind a URL, as `transcriptformer.fetching.fetcher.RemoteFile`.

    Parameters
    ----------
    url
        Where it is.
    size
        How large it is said to be elsewhere, in bytes; the server must agree.
    """

    def __init__(self, url: str, size: int | None = None) -> None:
        self.name, self.size = url, size
        self._session = requests.Session()
        self._begun: tuple[int, requests.Response] | None = None  # an answer, from that byte on, nothing of it read yet

    def close(self) -> None:
        """Let go of the connection."""
        self._drop()
        self._session.close()

    def _drop(self) -> None:
        begun, self._begun = self._begun, None
        if begun:
            begun[1].close()

    def stat(self, start: int) -> Stat:  # noqa: D102
        # Reading will go on with this answer: one request instead of two, and signed URLs allow no HEAD.
        self._drop()
        response = ask(self.name, {"Range": f"bytes={start}-"}, self._session)
        status = response.status_code
        if status == HTTPStatus.OK:  # the whole file, whatever was asked for
            found, start = response.headers.get("Content-Length", ""), 0
        else:  # 416 is the answer for an empty file
            found = response.headers.get("Content-Range", "").rpartition("/")[2]
        self._begun = start, response
        size = int(found) if _is_number(found) else self.size
        if size is None:
            raise DownloadError(f"{self.name}: the server does not tell how large it is")
        if self.size is not None and size != self.size:
            raise InterruptedDownloadError(f"{self.name}: the server has {size} bytes, {self.size} are expected")
        in_parts = status == HTTPStatus.PARTIAL_CONTENT or response.headers.get("Accept-Ranges") == "bytes"
        return Stat(size, _version(response) if in_parts else None)

    def read(self, start: int, stop: int, version: str | None) -> Generator[bytes]:  # noqa: D102
        headers = {"Range": f"bytes={start}-{stop - 1}", "If-Range": version} if version else {}
        begun = self._begun
        if begun and begun[0] == start:
            response, self._begun = begun[1], None
        else:
            response = ask(self.name, headers, self._session)
        with response, in_our_words(self.name):
            if version and not _continues(response, start, version):
                raise ChangedFileError(f"{self.name}: has changed since it was begun")
            while data := response.raw.read1(CHUNK):
                yield data


def ask(url: str, headers: dict[str, str], session: requests.Session | None = None) -> requests.Response:
    """The answer to a request; its body is still to come.

    Raises
    ------
    InterruptedDownloadError
        If there is no answer, or one that may pass.
    DownloadError
        If the server refuses.
    """
    # The bytes as they are stored, for their number is what ranges and sizes are about.
    headers = {"Accept-Encoding": "identity", **headers}
    with in_our_words(url):
        response = (session or requests).get(url, headers=headers, stream=True, timeout=TIMEOUT)
    status = response.status_code
    if status < HTTPStatus.BAD_REQUEST or status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return response
    response.close()
    answer = f"{url}: the server answers {status} {response.reason or ''}".rstrip()
    raise InterruptedDownloadError(answer, _ordered_wait(response)) if may_pass(status) else DownloadError(answer)


@contextmanager
def in_our_words(url: str) -> Iterator[None]:
    """Translate what goes wrong on the way."""
    try:
        yield
    except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema) as e:
        raise DownloadError(f"{url}: not an address that can be asked ({e})") from e
    except (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
        raise InterruptedDownloadError(f"{url}: {_reason(error)}") from error


def _version(response: requests.Response) -> str | None:
    """What tells versions of the file apart byte for byte; a weak ETag does not."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _continues(response: requests.Response, start: int, version: str) -> bool:
    """Whether the answer holds the wanted bytes of that version."""
    if response.status_code == HTTPStatus.PARTIAL_CONTENT:
        is_there = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
    else:
        is_there = response.status_code == HTTPStatus.OK and start == 0
    return is_there and _version(response) == version


def _ordered_wait(response: requests.Response) -> float:
    """Seconds of Retry-After, which is a number or a date."""
    value = response.headers.get("Retry-After", "")
    if _is_number(value):
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _reason(error: Exception) -> str:
    """What is behind a failed request, without the wrapping of three libraries."""
    text = str(error)
    for sign, reason in (
        ("NameResolution", "no such host, or no network"),
        ("refused", "the connection is refused"),
        ("unreachable", "the network is unreachable"),
        ("CERTIFICATE", "its certificate is not trusted"),
        ("timed out", "no answer in time"),
        ("reset", "the connection was reset"),
        ("IncompleteRead", "the connection broke off"),
        ("RemoteDisconnected", "the connection broke off"),
        ("ProxyError", "the proxy does not answer"),
    ):
        if sign in text or sign in type(error).__name__:
            return reason
    return one_line(error)
