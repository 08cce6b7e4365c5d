"""Pictures in a bucket of S3, or of anything that speaks its protocol."""

from __future__ import annotations

import hashlib
import posixpath
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from ...config.dataset import SourceSettings
from ...errors import DataError, SettingError
from . import EXTENSIONS, Found
from .local import no_pictures, repeats_of_name
from .table import text_stamp

HEAD_BYTES = 64 * 1024
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60


class S3Bucket:
    """The pictures under a prefix of a bucket, hidden ones left out.

    Credentials come from where Amazon's own tools look for them: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,
    AWS_PROFILE, ``~/.aws``. A process that is forked from this one needs a source of its own.
    """

    def __init__(self, settings: SourceSettings) -> None:
        if not settings.aws_bucket_name:
            raise SettingError('aws_bucket_name is ""; write the bucket that holds your pictures.')
        self._settings = settings
        self._bucket = settings.aws_bucket_name
        self._endpoint = _checked_endpoint(settings.aws_endpoint_url)
        prefix = settings.aws_data_prefix.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._opened: Any = None
        self.name = f"s3://{self._bucket}/{self._prefix}"
        self.identity: tuple[str, ...] = ("aws", self._endpoint, self._bucket, self._prefix)

    def find(self, on_found: Callable[[int], None] = lambda count: None) -> Iterator[Found]:
        pictures: list[tuple[str, int]] = []
        texts: dict[str, int] = {}
        for picture_id, stamp in self._list():
            stem, suffix = _split(picture_id)
            if suffix == ".txt":
                texts[stem] = stamp
            elif suffix in EXTENSIONS:
                pictures.append((picture_id, stamp))
                if not len(pictures) % 1000:
                    on_found(len(pictures))
        if not pictures:
            raise no_pictures(f"The bucket {self.name}{self._at()}")
        on_found(len(pictures))
        own_repeats = repeats_of_name(posixpath.basename(self._prefix.rstrip("/")) or self._bucket)
        folders: dict[str, int | None] = {"": own_repeats}
        for picture_id, stamp in sorted(pictures):
            folder = picture_id.rpartition("/")[0]
            if folder not in folders:
                named = [repeats_of_name(name) for name in reversed(folder.split("/"))]
                folders[folder] = next((repeats for repeats in named if repeats is not None), own_repeats)
            yield Found(picture_id, stamp, texts.get(_split(picture_id)[0], 0), repeats=folders[folder])

    def read(self, picture_id: str) -> bytes:
        return self._fetch(picture_id)

    def head(self, picture_id: str) -> bytes:
        """The first 64 KiB: a picture whose size stands behind a longer profile or preview must be read whole."""
        return self._fetch(picture_id, HEAD_BYTES)

    def text(self, picture_id: str) -> bytes | None:
        try:
            return bytes(self._files().cat_file(f"{self._bucket}/{self._prefix}{_split(picture_id)[0]}.txt"))
        except FileNotFoundError:
            return None
        except Exception as error:  # s3fs lets errors of four libraries through
            raise self._failed(error) from None

    def fingerprint(self) -> str:
        """Names, sizes, times and entity tags of pictures and texts, from one listing."""
        entries = sorted(entry for entry in self._list() if _split(entry[0])[1] in (*EXTENSIONS, ".txt"))
        return hashlib.sha256(repr(entries).encode()).hexdigest()

    def _list(self) -> Iterator[tuple[str, int]]:
        """Id and stamp of all objects. Page by page, for a whole listing of s3fs needs 1 GB per million."""
        more: dict[str, str] = {}
        while True:
            try:
                page = self._files().call_s3("list_objects_v2", Bucket=self._bucket, Prefix=self._prefix, **more)
            except Exception as error:  # s3fs lets errors of four libraries through
                raise self._failed(error) from None
            for entry in page.get("Contents", ()):
                picture_id = entry["Key"][len(self._prefix) :]
                if not any(part.startswith(".") for part in picture_id.split("/")):
                    yield picture_id, _stamp(entry["Size"], entry.get("ETag", ""), entry.get("LastModified"))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _fetch(self, picture_id: str, count_bytes: int | None = None) -> bytes:
        path = f"{self._bucket}/{self._prefix}{picture_id}"
        try:
            if count_bytes is not None:
                try:
                    return bytes(self._files().cat_file(path, start=0, end=count_bytes))
                except (FileNotFoundError, PermissionError):
                    raise
                except OSError:  # a server that knows no ranges, or an object without a byte: read it whole
                    pass
            return bytes(self._files().cat_file(path))
        except FileNotFoundError:
            raise DataError(
                f"The picture {self.name}{picture_id} is gone. Put it back, or start again without it."
            ) from None
        except Exception as error:  # s3fs lets errors of four libraries through
            raise self._failed(error) from None

    def _files(self) -> Any:
        with self._lock:
            if self._opened is None:
                try:
                    import s3fs
                except ImportError:
                    raise SettingError("The source aws needs the package s3fs. Install it: pip install s3fs") from None
                region = self._settings.aws_region_name
                self._opened = s3fs.S3FileSystem(
                    endpoint_url=self._endpoint or None,
                    client_kwargs={"region_name": region} if region else {},
                    config_kwargs={
                        "max_pool_connections": self._settings.aws_max_pool_connections,
                        "connect_timeout": CONNECT_TIMEOUT_S,
                        "read_timeout": READ_TIMEOUT_S,
                        "retries": {"max_attempts": 3, "mode": "standard"},
                    },
                    skip_instance_cache=True,
                    use_listings_cache=False,
                )
            return self._opened

    def _at(self) -> str:
        return f" at {self._endpoint}" if self._endpoint else ""

    def _failed(self, error: Exception) -> DataError:
        """The sentence for an error; of the error itself only its kind is told, its text might hold a secret."""
        kind = _kind(error)
        place = f"{self.name}{self._at()}"
        if isinstance(error, DataError):
            return error
        if kind in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"):
            remedy = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or AWS_PROFILE."
            return DataError(f"The bucket {place} needs credentials, and there are none ({kind}). {remedy}")
        if isinstance(error, PermissionError):
            remedy = "Check the keys in the environment, and that they may list and read the bucket."
            return DataError(f"The bucket {place} refuses access ({kind}). {remedy}")
        if isinstance(error, FileNotFoundError):
            remedy = "Check aws_bucket_name, aws_endpoint_url and aws_region_name."
            return DataError(f"There is no bucket {place} ({kind}). {remedy}")
        remedy = "Check aws_endpoint_url, aws_region_name and the connection, and try again."
        return DataError(f"The bucket {place} cannot be reached ({kind}). {remedy}")


def _checked_endpoint(url: str) -> str:
    if not url:
        return ""
    parts = urlsplit(url)
    if "@" in url or parts.query:
        raise SettingError(
            "aws_endpoint_url holds credentials; write the bare address. Keys belong into the environment: "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise SettingError(f"aws_endpoint_url is {url!r}; write it with https://, or leave it empty for Amazon.")
    return url.rstrip("/")


def _split(picture_id: str) -> tuple[str, str]:
    """Path without extension, and the extension in small letters."""
    stem, suffix = posixpath.splitext(picture_id)
    return stem, suffix.lower()


def _stamp(size_bytes: int, tag: str, modified: datetime | None) -> int:
    return text_stamp((str(size_bytes), tag, modified.isoformat() if modified else ""))


def _kind(error: BaseException) -> str:
    """The service's code of an error, such as AccessDenied, else its class."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
        if code:
            return str(code)
        cause = cause.__cause__
    return type(error).__name__
