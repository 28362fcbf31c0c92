"""Objects of public S3 buckets."""

import base64
import re
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Any

import boto3
import urllib3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from botocore.exceptions import ConnectionError as BotoConnectionError

from transcriptformer.errors import DownloadError, one_line
from transcriptformer.fetching.fetcher import (
    CONNECT_TIMEOUT,
    READ_TIMEOUT,
    ChangedFileError,
    Stat,
    TransientDownloadError,
    is_transient,
)

CHUNK = 2**18
"""Bytes per read; a broken connection loses the current chunk."""

CHECKSUMS = {"ChecksumSHA256": "sha256", "ChecksumSHA1": "sha1", "ChecksumCRC32": "crc32"}
"""Supported checksums: S3's field and the algorithm."""

_TRANSIENT = (
    BotoConnectionError,
    HTTPClientError,
    IncompleteReadError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)
"""Failures of a request that a retry may help."""


class S3Object:
    """A publicly readable object, as `transcriptformer.fetching.fetcher.RemoteFile`.

    Parameters
    ----------
    bucket, key
        Location of the object; AWS_ENDPOINT_URL_S3 sets the endpoint.
    connections
        Maximum parallel requests.
    """

    def __init__(self, bucket: str, key: str, connections: int = 1) -> None:
        self.bucket, self.key, self.connections = bucket, key, connections

    @property
    def name(self) -> str:  # noqa: D102
        return f"s3://{self.bucket}/{self.key}"

    def stat(self, start: int) -> Stat:  # noqa: D102
        with self._translated_errors():
            found = self._client.head_object(Bucket=self.bucket, Key=self.key, ChecksumMode="ENABLED")
        return Stat(found["ContentLength"], found.get("ETag"), _checksum(found))

    def read(self, start: int, stop: int, version: str | None) -> Generator[bytes]:  # noqa: D102
        part = {"Range": f"bytes={start}-{stop - 1}", "IfMatch": version} if version else {}
        with self._translated_errors():
            found = self._client.get_object(Bucket=self.bucket, Key=self.key, **part)
            with closing(found["Body"]) as body:
                if part and (
                    found.get("ETag") != version or not found.get("ContentRange", "").startswith(f"bytes {start}-")
                ):
                    raise ChangedFileError(f"{self.name}: changed during the download, or range requests fail")
                yield from body.iter_chunks(CHUNK)

    @cached_property
    def _client(self) -> Any:
        # The fetcher retries and resumes; boto3's own retries would hide that.
        config = Config(
            signature_version=UNSIGNED,
            retries={"total_max_attempts": 1},
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
            max_pool_connections=max(10, self.connections),
        )
        return boto3.client("s3", config=config)

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise _download_error(self.name, error) from error
        except _TRANSIENT as error:
            raise TransientDownloadError(f"{self.name}: {one_line(error)}") from error
        except (BotoCoreError, ValueError) as error:  # a wrong setting, such as an invalid endpoint
            raise DownloadError(f"{self.name}: {one_line(error)}") from error


def _checksum(found: dict[str, Any]) -> tuple[str, str] | None:
    """Return the checksum of the whole object, if any; that of a multipart upload covers only its parts."""
    for name, algorithm in CHECKSUMS.items():
        value = found.get(name, "-")
        if "-" not in value:
            return algorithm, value
    tag = found.get("ETag", "").strip('"')
    is_md5 = (
        re.fullmatch("[0-9a-f]{32}", tag) is not None
        and found.get("ServerSideEncryption", "AES256") == "AES256"
        and "SSECustomerAlgorithm" not in found
    )
    return ("md5", base64.b64encode(bytes.fromhex(tag)).decode()) if is_md5 else None


def _download_error(name: str, error: ClientError) -> DownloadError:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    message = f"{name}: HTTP {status} {error.response.get('Error', {}).get('Message', '')}".rstrip()
    if status == 412:
        return ChangedFileError(f"{name}: changed during the download")
    if is_transient(status):
        return TransientDownloadError(message)
    return DownloadError(message)
