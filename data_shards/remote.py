"""Files behind URLs: any scheme that fsspec knows (s3, gs, http, file, …), with bounded sizes, time-outs and retries.

Credentials and endpoints are fsspec's own matter: its configuration files and the variables FSSPEC_SCHEME_OPTION.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, TypeVar

from vitgraft.configs.errors import ConfigError, DataError

ATTEMPTS = 6
"""Number of attempts at a transfer before the URL counts as unreachable."""
FIRST_DELAY = 1.0
LONGEST_DELAY = 30.0
"""Seconds between attempts: doubled each time, times a random factor, so that many readers do not come back at once."""
STALL_SECONDS = 30.0
"""A connection that is silent for so long is given up and tried again (http; other schemes have their own limits)."""
SLOWEST = 256 << 10
"""Bytes per second below which a transfer is given up: a server that drips could hold a reader for ever."""
_CHUNK = 1 << 20
_BLOCK = 8 << 20
"""Bytes of one request where a scheme reads by requests for ranges."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_LISTED = re.compile(rb'href="(?:\./)?([\w.\-]+)"')
_MAX_LISTING_BYTES = 16 << 20
_NO_FOLDERS = {
    *("async_wrapper", "asyncwrapper", "blockcache", "cached", "data", "dir", "filecache", "generic", "libarchive"),
    *("reference", "simplecache", "tar", "zip"),
}
"""Schemes of fsspec that name no folder of files by themselves."""
_log = logging.getLogger("vitgraft")
_RETRIED_STATUS = (408, 425, 429)

T = TypeVar("T")
_delays = random.SystemRandom()


class UnreachableError(DataError):
    """Data cannot be fetched now. Unlike damage it says nothing about the data, so it is never a reason to skip."""


def is_url(path: object) -> bool:
    """Tell whether ``path`` is a URL; plain paths and ``digits:KIND/SPLIT`` are not."""
    return isinstance(path, str) and _URL.match(path) is not None


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def join(url: str, name: str) -> str:
    """Return the URL of a file in a folder; a query (a signature, say) stays at the end."""
    base, mark, query = url.partition("?") if _is_http(url) else (url, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def shown(url: str) -> str:
    """Return the URL without user, password and query, which may be secrets: for messages."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


def read_small(url: str, limit: int) -> bytes:
    """Return a whole file of at most ``limit`` bytes.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: larger than the limit, or it cannot be fetched (UnreachableError).
        ConfigError: no support for the scheme is installed.
    """
    data = _retry(url, lambda: b"".join(_stream(url, limit)))
    if len(data) > limit:
        raise DataError(f"{shown(url)}: larger than {limit} bytes; is this the right file?")
    return data


def download(url: str, descriptor: int, limit: int) -> tuple[int, str]:
    """Write a file to an open descriptor, from its start: (bytes, SHA-256 in hex).

    At most ``limit`` bytes and one chunk are written, whatever the server says; more bytes than the limit mean that
    the file is longer.

    Raises:
        FileNotFoundError, OSError: there is no such file; the descriptor cannot be written.
        DataError, ConfigError: as in :func:`read_small`.
    """

    def once() -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        os.lseek(descriptor, 0, os.SEEK_SET)
        for chunk in _stream(url, limit):
            digest.update(chunk)
            _write(descriptor, chunk)
            size += len(chunk)
        return size, digest.hexdigest()

    return _retry(url, once)


def list_names(url: str) -> list[str]:
    """Return the names of the files in a folder, sorted. Over http the server must show its folders as pages with
    links.

    Raises:
        FileNotFoundError: there is no such folder.
        DataError, ConfigError: as in :func:`read_small`.
    """
    if _is_http(url):
        # Not by fsspec, which reads such a page whole, however long it is.
        page = read_small(join(url, ""), _MAX_LISTING_BYTES)
        return sorted({name.decode() for name in _LISTED.findall(page)})

    def once() -> list[str]:
        system, path = file_system(url)
        return sorted({str(entry).rstrip("/").rpartition("/")[2] for entry in system.ls(path, detail=False)})

    return _retry(url, once)


class LocalWriteError(Exception):
    """Carries an OSError of this machine's disk past the retries, which are for the remote side."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def _write(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except OSError as error:
            raise LocalWriteError(error) from None


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL (it keeps one for each kind and process) and the path in it."""
    if "::" in url:
        raise ConfigError(f"{shown(url)}: chained URLs are not supported; name one file system")
    scheme = url.partition("://")[0].lower()
    if scheme in _NO_FOLDERS:
        raise ConfigError(f"{shown(url)}: {scheme}:// names no folder of files; unpack it and name the folder")
    try:
        import fsspec

        options: dict[str, Any] = {}
        if _is_http(url):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        system, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise ConfigError(
            f"{shown(url)}: {' '.join(str(error).split())[:120]}; http needs: pip install 'vitgraft[remote]', s3: "
            "pip install s3fs, gs: pip install gcsfs"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{shown(url)}: {error}; use s3://, gs://, http(s):// or another scheme of fsspec") from None
    except OSError:
        raise  # some connect at once: tried again
    except Exception as error:  # an argument is missing, or the client's own settings are wrong
        raise ConfigError(
            f"{shown(url)}: {scheme}:// cannot be used ({_reason(url, error)}); check the client's settings, or use "
            "s3://, gs:// or http(s)://"
        ) from None
    return system, path


def _stream(url: str, limit: int) -> Iterator[bytes]:
    """Yield the bytes of a file until its end or until there are more than ``limit``."""
    system, path = file_system(url)
    deadline = time.monotonic() + STALL_SECONDS + limit / SLOWEST
    # Over http one plain request and a stream: what fsspec does for ranges trusts the server to send no more.
    plain = {"block_size": 0, "size": 1, "headers": {"Accept-Encoding": "identity"}}
    options = plain if _is_http(url) else {"block_size": _BLOCK}
    left = limit + 1
    with closing(system.open(path, "rb", **options)) as stream:
        while left > 0 and (chunk := stream.read(min(_CHUNK, left))):
            yield chunk
            left -= len(chunk)
            if time.monotonic() > deadline:
                raise TimeoutError(f"slower than {SLOWEST >> 10} KiB per second")


def _retry(url: str, action: Callable[[], T]) -> T:
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, ConfigError):
            raise
        except LocalWriteError as failure:
            raise failure.error from None
        # File systems raise whatever their client libraries do, and not all of it is an OSError.
        except Exception as error:
            status = getattr(error, "status", None)
            refused = isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED_STATUS
            reason = f"HTTP status {status}" if isinstance(status, int) else _reason(url, error)
            if refused or isinstance(error, PermissionError):
                raise UnreachableError(f"{shown(url)}: refused ({reason}); check the URL and your access") from None
            if isinstance(error, NotImplementedError | TypeError | AttributeError):
                raise ConfigError(f"{shown(url)}: cannot be read as a file ({reason}); use another scheme") from None
            if attempt == 0:
                _log.warning("%s: %s; trying again, %d times in all", shown(url), reason, ATTEMPTS)
            if attempt + 1 < ATTEMPTS:
                delay = min(LONGEST_DELAY, FIRST_DELAY * 2**attempt)
                time.sleep(delay * _delays.uniform(0.5, 1.5))
    raise UnreachableError(
        f"{shown(url)}: cannot be fetched after {ATTEMPTS} attempts ({reason}); check the network, then run again"
    )


def _reason(url: str, error: Exception) -> str:
    text = " ".join(str(error).split()).replace(url, shown(url))
    if isinstance(error, TimeoutError) and not text.startswith("slower"):
        return f"no answer for {STALL_SECONDS:g} s"
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
