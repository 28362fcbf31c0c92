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

from transcriptformer.errors import DownloadError, one_line
from transcriptformer.fetching.fetcher import (
    CONNECT_TIMEOUT,
    READ_TIMEOUT,
    ChangedFileError,
    InterruptedDownloadError,
    Stat,
    may_pass,
)

CHUNK = 2**18
"""Bytes that are taken at a time; what came of a chunk is lost when the connection breaks."""

CHECKSUMS = {"ChecksumSHA256": "sha256", "ChecksumSHA1": "sha1", "ChecksumCRC32": "crc32"}
"""What S3 calls the checksums that can be compared here."""


class S3Object:
    """An object that everyone may read, as `transcriptformer.fetching.fetcher.RemoteFile`.

    Parameters
    ----------
    bucket, key
        Where it is; the service's address is boto3's own setting (AWS_ENDPOINT_URL_S3).
    connections
        Most requests at once.
    """

    def __init__(self, bucket: str, key: str, connections: int = 1) -> None:
        self.bucket, self.key, self.connections = bucket, key, connections

    @property
    def name(self) -> str:  # noqa: D102
        return f"s3://{self.bucket}/{self.key}"

    def stat(self, start: int) -> Stat:  # noqa: D102
        with self._in_our_words():
            found = self._client.head_object(Bucket=self.bucket, Key=self.key, ChecksumMode="ENABLED")
        return Stat(found["ContentLength"], found.get("ETag"), _checksum(found))

    def read(self, start: int, stop: int, version: str | None) -> Generator[bytes]:  # noqa: D102
        part = {"Range": f"bytes={start}-{stop - 1}", "IfMatch": version} if version else {}
        with self._in_our_words():
            found = self._client.get_object(Bucket=self.bucket, Key=self.key, **part)
            with closing(found["Body"]) as body:
                if part and (
                    found.get("ETag") != version or not found.get("ContentRange", "").startswith(f"bytes {start}-")
                ):
                    raise ChangedFileError(f"{self.name}: has changed since it was begun, or does not come in parts")
                yield from body.iter_chunks(CHUNK)

    @cached_property
    def _client(self) -> Any:
        # Our own retries go on where a broken connection ended; boto3's would hide them.
        config = Config(
            signature_version=UNSIGNED,
            retries={"total_max_attempts": 1},
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
            max_pool_connections=max(10, self.connections),
        )
        return boto3.client("s3", config=config)

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise _refusal(self.name, error) from error
        except (HTTPClientError, IncompleteReadError, urllib3.exceptions.HTTPError, ConnectionError) as error:
            raise InterruptedDownloadError(f"{self.name}: {one_line(error)}") from error
        except (BotoCoreError, ValueError) as error:  # a setting, such as an impossible address
            raise DownloadError(f"{self.name}: {one_line(error)}") from error


def _checksum(found: dict[str, Any]) -> tuple[str, str] | None:
    """Of the whole object, if S3 knows one; that of a part-wise upload is of its parts."""
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


def _refusal(name: str, error: ClientError) -> DownloadError:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    reason = f"{name}: the server answers {status} {error.response.get('Error', {}).get('Message', '')}".rstrip()
    if status == 412:
        return ChangedFileError(f"{name}: has changed since it was begun")
    if may_pass(status):
        return InterruptedDownloadError(reason)
    return DownloadError(reason)
