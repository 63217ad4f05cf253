"""List and fetch the objects that URLs name, in a bucket or on a web server, through fsspec.

Nothing else in clipkd speaks to a network while it reads data.  Importing this module needs neither torch nor numpy.
"""

import hashlib
import importlib.util
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from toolchain.errors import ClipkdError, MissingDependency, UsageError, name_some
from toolchain.filesystem import describe_os_error, file_sha256

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_ATTEMPTS = 5
_FIRST_WAIT_S = 1.0  # doubles with each attempt: 15 s in all
_TIMEOUT_S = 60  # without a byte
_LISTED_FROM = 16  # objects of one folder from which one listing, of 1,000 a request, is cheaper than asking for each
_STREAMS = 32  # requests for facts about objects at once
_LASTING = frozenset({400, 401, 403, 404, 405, 410, 416})  # answers of a web server that a repetition does not change
_NO_LOGIN = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "DefaultCredentialsError"}
)
_VERSIONS = ("generation", "ETag", "etag", "Last-Modified", "LastModified")  # of Google, S3 and web servers

INDEX = "index.json"
"""The list beside the shards that `clipkd data pack` writes; whoever has it need not read shards to count samples."""

Found = TypeVar("Found")


class RemoteFile(NamedTuple):
    """An object as its server describes it."""

    url: str
    size_bytes: int
    version: str
    """ETag, generation or time of the last change: another one is another content."""

    num_samples: int | None = None
    """Number of samples according to the `INDEX` beside it; None if there is none."""

    sha256: str = ""
    """Hash of the content according to the `INDEX` beside it."""

    @property
    def name(self) -> str:
        """The URL without its query, for messages."""
        return without_query(self.url)


class TransferError(Exception):
    """An object that did not arrive whole in any attempt."""


def is_remote(name: str) -> bool:
    return "://" in name


def without_query(url: str) -> str:
    """Return a URL without its query, which may be a signature; anything else as it is."""
    return url.partition("?")[0] if is_remote(url) else url


def open_filesystem(url: str) -> Any:
    """Return the fsspec file system of a URL.

    Raises:
        UsageError: the protocol is none of those that clipkd reads.
        MissingDependency: its package is not installed.
    """
    protocol = url.partition("://")[0]
    package = _PACKAGES.get(protocol)
    if package is None:
        raise UsageError(f"data.shards: {url}: {protocol}:// is not read; expected s3://, gs://, https:// or http://")
    if importlib.util.find_spec("fsspec") is None or importlib.util.find_spec(package) is None:
        raise MissingDependency(
            f"data.shards: {url}: {protocol}:// needs the package {package}, which is not installed. "
            "Install it: pip install 'clipkd[remote]'"
        )
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}  # a listing is for finding changes
    if package == "aiohttp":
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_S, sock_read=_TIMEOUT_S)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}  # proxies from the environment
    return fsspec.filesystem(protocol, **options)


def list_files(urls: Sequence[str]) -> list[RemoteFile]:
    """Return size and version of objects, in order; no content is read.

    A process asks once: all stages of a run then mean the same objects, and fetching finds those that have changed.

    Raises:
        UsageError: some do not exist, may not be read, or their server does not tell their size.
        MissingDependency: a package is not installed.
        ClipkdError: a server does not answer.
    """
    return list(_list_once(tuple(urls)))


@lru_cache(maxsize=16)
def _list_once(urls: tuple[str, ...]) -> tuple[RemoteFile, ...]:
    by_folder: dict[str, list[str]] = defaultdict(list)
    for url in urls:
        by_folder[without_query(url).rpartition("/")[0]].append(url)
    facts: dict[str, dict[str, Any]] = {}
    for folder, own in by_folder.items():
        filesystem = open_filesystem(folder)
        if len(own) >= _LISTED_FROM and not folder.startswith("http"):
            protocol = folder.partition("://")[0]
            entries = _ask(lambda: filesystem.ls(folder, detail=True), folder)  # noqa: B023  # called at once
            facts |= {f"{protocol}://{entry['name']}": entry for entry in entries or ()}
            continue
        with ThreadPoolExecutor(min(_STREAMS, len(own))) as pool:
            answers = pool.map(lambda url: _ask(lambda: open_filesystem(url).info(url), url), own)
            facts |= {url: answer for url, answer in zip(own, answers, strict=True) if answer is not None}
    if missing := [url for url in urls if url not in facts]:
        raise UsageError(
            f"data.shards: {len(missing):,} of {len(urls):,} shards do not exist: "
            f"{name_some(list(map(without_query, missing)))}. "
            "Upload them, or list only those that exist"
        )
    if unsized := [url for url in urls if facts[url].get("size") is None]:
        raise UsageError(
            f"data.shards: {without_query(unsized[0])}: its server does not tell its size; copy the shards elsewhere"
        )
    return tuple(RemoteFile(url, int(facts[url]["size"]), _find_version(facts[url])) for url in urls)


def _ask(question: Callable[[], Found], url: str) -> Found | None:
    """Return a server's answer, None if the object does not exist."""
    try:
        return _repeat(question, url)
    except FileNotFoundError:
        return None
    except TransferError as error:
        raise ClipkdError(
            f"data.shards: {without_query(url)}: {error}. Repeat the command once the server answers"
        ) from None


def _find_version(facts: dict[str, Any]) -> str:
    return next((str(facts[key]) for key in _VERSIONS if facts.get(key)), "")


def add_counts(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Return the files with the numbers of samples and hashes from the `INDEX` beside them, where there is one.

    An entry of another size than the object's is not used: it describes another file.

    Raises:
        UsageError: an index is not JSON, or not of the form that `clipkd data pack` writes.
    """
    entries: dict[str, Any] = {}
    for folder in {file.name.rpartition("/")[0]: None for file in files}:
        entries |= {f"{folder}/{entry['name']}": entry for entry in _read_index(f"{folder}/{INDEX}")}
    found = []
    for file in files:
        entry = entries.get(file.name)
        if entry is not None and entry["bytes"] == file.size_bytes:
            file = file._replace(num_samples=int(entry["samples"]), sha256=str(entry.get("sha256", "")))
        found.append(file)
    return found


def _read_index(url: str) -> list[dict[str, Any]]:
    try:
        content = _repeat(lambda: open_filesystem(url).cat_file(url), url)
    except (FileNotFoundError, UsageError):  # S3 answers 403 for an object that is not there if listing is forbidden
        return []
    except TransferError as error:
        raise ClipkdError(f"{url}: {error}. Repeat the command once the server answers") from None
    if content.lstrip()[:1] != b"{":  # some web servers answer with a page instead of 404
        return []
    try:
        shards: list[dict[str, Any]] = json.loads(content)["shards"]
        if all(isinstance(entry["name"], str) and entry["samples"] >= 0 <= entry["bytes"] for entry in shards):
            return shards
    except (ValueError, KeyError, TypeError):
        pass
    raise UsageError(
        f"{url}: expected the index that `clipkd data pack` writes: "
        '{"shards": [{"name": "00000.tar", "samples": 10000, "bytes": 230000000}, ...]}. Correct it or remove it'
    )


def fingerprint(files: Sequence[RemoteFile]) -> str:
    """Return a hash of the objects' names, sizes and versions, in order."""
    digest = hashlib.sha256(b"remote\0")
    for file in files:
        name = file.name.rpartition("/")[2]
        digest.update(f"{name}\0{file.size_bytes}\0{file.version}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def fetch(file: RemoteFile, path: Path) -> None:
    """Write an object's content to `path`; attempts that fail are repeated, after 1, 2, 4 and 8 s.

    Raises:
        TransferError: no attempt brought the whole content.
        UsageError: the object may not be read.
        ClipkdError: it has been changed or removed, or the local disk is full.
    """

    def transfer() -> None:
        filesystem = open_filesystem(file.url)
        filesystem.get_file(file.url, str(path))
        if file.version and _find_version(filesystem.info(file.url)) != file.version:
            raise _Changed
        arrived = path.stat().st_size
        if arrived != file.size_bytes:
            raise OSError(f"{arrived:,} of {file.size_bytes:,} bytes arrived")
        if file.sha256 and file_sha256(path) != file.sha256:
            raise OSError(f"its sha256 is not that of {INDEX}")

    try:
        _repeat(transfer, file.url)
    except FileNotFoundError:
        raise ClipkdError(f"{file.name}: cannot be read: it no longer exists. Restore it") from None
    except _Changed:
        raise ClipkdError(
            f"{file.name}: has changed since training began, so sample numbers no longer match. Start training again"
        ) from None


class _Changed(Exception):
    """The object has another version than when it was listed."""


def _repeat(call: Callable[[], Found], url: str) -> Found:
    """Return what a call returns; repeat it after errors that may pass.

    Raises:
        TransferError: every attempt failed.
        FileNotFoundError: the object does not exist.
        UsageError: it may not be read.
        ClipkdError: the local disk is full.
    """
    wait_s = _FIRST_WAIT_S
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except (FileNotFoundError, ClipkdError, _Changed):
            raise
        except Exception as error:  # each of fsspec's packages has errors of its own
            status, name = _find_status(error), type(error).__name__
            refused = isinstance(error, PermissionError) or str(error).startswith("Forbidden:")  # gcsfs's text
            if refused or status in (401, 403) or name in _NO_LOGIN:
                raise UsageError(
                    f"data.shards: {without_query(url)}: may not be read: {_describe(error)}. Set the credentials "
                    "of its server in the environment, such as AWS_PROFILE or AWS_ACCESS_KEY_ID"
                ) from None
            if isinstance(error, OSError) and (advice := describe_os_error(error)):
                raise ClipkdError(advice) from None
            if status in _LASTING or attempt == _ATTEMPTS:
                raise TransferError(f"{_describe(error)} (attempts: {attempt})") from error
        time.sleep(wait_s * random.Random().uniform(0.75, 1.25))  # readers that failed together must not meet again
        wait_s *= 2
    raise AssertionError("the last attempt returns or raises")


def _find_status(error: Exception) -> int | None:
    """Return the HTTP status of an error of aiohttp (`status`) or gcsfs (`code`), if it has one."""
    found = getattr(error, "status", None) or getattr(error, "code", None)
    return int(found) if isinstance(found, int | str) and str(found).isdigit() else None


def _describe(error: Exception) -> str:
    """Return an error in one line, without the query of a signed URL."""
    status = _find_status(error)
    text = f"HTTP {status} {getattr(error, 'message', '')}" if status else str(error)
    return " ".join(text.split()) or type(error).__name__
