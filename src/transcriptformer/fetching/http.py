"""Files on HTTP and HTTPS servers."""

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
    Stat,
    TransientDownloadError,
    is_transient,
)

TIMEOUT = (CONNECT_TIMEOUT, READ_TIMEOUT)

CHUNK = 2**20
"""Maximum bytes per read."""


class HttpFile:
    """A file behind a URL, as `transcriptformer.fetching.fetcher.RemoteFile`.

    Parameters
    ----------
    url
        Address of the file.
    size
        Expected size in bytes; the server must agree.
    """

    def __init__(self, url: str, size: int | None = None) -> None:
        self.name, self.size = url, size
        self._session = requests.Session()
        self._pending: tuple[int, requests.Response] | None = None  # first byte, and the unread response

    def close(self) -> None:
        """Close the connection."""
        self._drop_response()
        self._session.close()

    def _drop_response(self) -> None:
        pending, self._pending = self._pending, None
        if pending:
            pending[1].close()

    def stat(self, start: int) -> Stat:  # noqa: D102
        # `read` continues with this response, which saves a request; signed URLs do not allow HEAD.
        self._drop_response()
        response = http_get(self.name, {"Range": f"bytes={start}-"}, self._session)
        status = response.status_code
        if status == HTTPStatus.OK:  # the whole file: range ignored
            found, start = response.headers.get("Content-Length", ""), 0
        else:  # 206, or 416 for an empty file
            found = response.headers.get("Content-Range", "").rpartition("/")[2]
        self._pending = start, response
        size = int(found) if _is_number(found) else self.size
        if size is None:
            raise DownloadError(f"{self.name}: the server does not send the file size")
        if self.size is not None and size != self.size:
            raise TransientDownloadError(f"{self.name}: {size} bytes on the server, expected {self.size}")
        in_parts = status == HTTPStatus.PARTIAL_CONTENT or response.headers.get("Accept-Ranges") == "bytes"
        return Stat(size, _version(response) if in_parts else None)

    def read(self, start: int, stop: int, version: str | None) -> Generator[bytes]:  # noqa: D102
        headers = {"Range": f"bytes={start}-{stop - 1}", "If-Range": version} if version else {}
        pending = self._pending
        if pending and pending[0] == start:
            response, self._pending = pending[1], None
        else:
            response = http_get(self.name, headers, self._session)
        with response, translated_errors(self.name):
            if version and not _matches(response, start, version):
                raise ChangedFileError(f"{self.name}: changed during the download")
            while data := response.raw.read1(CHUNK):
                yield data


def http_get(url: str, headers: dict[str, str], session: requests.Session | None = None) -> requests.Response:
    """Send a GET request and return the streaming response.

    Raises
    ------
    TransientDownloadError
        If there is no response, or a transient error status.
    DownloadError
        If the server returns another error status.
    """
    # No compression: ranges and sizes refer to the stored bytes.
    headers = {"Accept-Encoding": "identity", **headers}
    with translated_errors(url):
        response = (session or requests).get(url, headers=headers, stream=True, timeout=TIMEOUT)
    status = response.status_code
    if status < HTTPStatus.BAD_REQUEST or status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return response
    response.close()
    message = f"{url}: HTTP {status} {response.reason or ''}".rstrip()
    raise TransientDownloadError(message, _retry_after(response)) if is_transient(status) else DownloadError(message)


@contextmanager
def translated_errors(url: str) -> Iterator[None]:
    """Translate errors of requests and urllib3 to DownloadError."""
    try:
        yield
    except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema) as e:
        raise DownloadError(f"{url}: not a valid URL ({e})") from e
    except (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
        raise TransientDownloadError(f"{url}: {_reason(error)}") from error


def _version(response: requests.Response) -> str | None:
    """Return a strong ETag or the modification date; weak ETags do not identify the bytes."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _matches(response: requests.Response, start: int, version: str) -> bool:
    """Whether the response starts at byte `start` of that version."""
    if response.status_code == HTTPStatus.PARTIAL_CONTENT:
        is_at_start = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
    else:
        is_at_start = response.status_code == HTTPStatus.OK and start == 0
    return is_at_start and _version(response) == version


def _retry_after(response: requests.Response) -> float:
    """Return the seconds of Retry-After, which is a number or a date; 0 if absent."""
    value = response.headers.get("Retry-After", "")
    if _is_number(value):
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _reason(error: BaseException) -> str:
    """Describe the cause of a failed request without the wrapping of three libraries, whose messages hold the URL."""
    while isinstance(cause := getattr(error, "reason", None) or next(iter(error.args), None), BaseException):
        error = cause
    text = str(error)
    for sign, reason in (
        ("NameResolution", "host not found, or no network"),
        ("refused", "the connection was refused"),
        ("unreachable", "the network is unreachable"),
        ("CERTIFICATE", "the certificate is not trusted"),
        ("timed out", "timed out"),
        ("reset", "the connection was reset"),
        ("IncompleteRead", "the connection was closed early"),
        ("RemoteDisconnected", "the connection was closed early"),
        ("ProxyError", "the proxy does not respond"),
    ):
        if sign in text or sign in type(error).__name__:
            return reason
    return one_line(error)
