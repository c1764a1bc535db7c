"""Paths, and what object stores do otherwise than file systems: an object appears whole or not at all, cannot be
appended to, and has no folder around it.
"""

import contextlib
import importlib
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from oasis_jax.errors import UserError, unknown_name

# Scheme -> the package that speaks to the store, and the extra that brings it.
_STORES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_SECONDS_TO_ANSWER = 45

Path = pathlib.Path | epath.Path


class Stored(NamedTuple):
    """An object as its store lists it."""

    size: int  # bytes
    checksum: str  # of the content, as the store computed it; of gs:// the CRC-32C


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in an object store."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in _STORES))


def as_path(text: str | os.PathLike, what: str) -> Path:
    """The path behind what a user wrote; nothing is asked over the network.

    Args:
      text: a local path, gs://bucket/name or s3://bucket/name.
      what: the flag or field, for messages.

    Raises:
      UserError: another scheme, no bucket, a name that no local copy could have, or the package that speaks to the
        store is not installed.
    """
    if not is_remote(text):
        text = os.fspath(text)
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text) if isinstance(text, str) else None
        if scheme:
            raise unknown_name(f"{what}: {text!r}: scheme", scheme[1], _STORES)
        return pathlib.Path(text)
    scheme, _, rest = os.fspath(text).partition("://")
    parts = rest.rstrip("/").split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise UserError(f"{what}: {os.fspath(text)!r}: expected {scheme}://BUCKET/NAME without empty parts, . and ..")
    _check_installed(scheme, what)
    return epath.Path(f"{scheme}://{'/'.join(parts)}")


def local_path(text: str | os.PathLike, what: str) -> pathlib.Path:
    """The path behind what a user wrote, where it has to be on this machine; raises UserError for one in a store."""
    if is_remote(text):
        raise UserError(
            f"{what}: {os.fspath(text)!r}: has to be on this machine; copy a folder with the store's own tool"
        )
    return as_path(text, what)


def _check_installed(scheme: str, what: str) -> None:
    package, extra = _STORES[scheme]
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"{what}: {scheme}:// needs the package {package}; python -m pip install 'oasis_jax[{extra}]'"
        ) from None


def filesystem(path: str | os.PathLike) -> Any:
    """The fsspec file system of a path in a store, the one that `epath` uses, without a memory of what was listed."""
    import fsspec
    from etils.epath import backend

    for protocol in ("gcs", "gs", "s3"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what fails is said by `in_words`, in a line
    return backend.fsspec_backend.fs(os.fspath(path))


def reach(path: Path, what: str) -> str | None:
    """Looks whether a store answers: "file" or "directory" where something is at the path, None where nothing is.

    Raises:
      UserError: no such bucket, no access, no answer.
    """
    from fsspec.asyn import sync

    with in_words(path, f"{what}: {os.fspath(path)!r}"):
        store = filesystem(path)
        bucket = os.fspath(path).partition("://")[2].partition("/")[0]
        ask = lambda name: sync(store.loop, store._info, name, timeout=_SECONDS_TO_ANSWER)["type"]
        with contextlib.suppress(FileNotFoundError):
            return ask(os.fspath(path))
        try:
            ask(bucket)
        except FileNotFoundError:
            raise UserError(
                f"{what}: {os.fspath(path)!r}: there is no bucket {bucket!r}, or it may not be looked at"
            ) from None
        return None


@contextlib.contextmanager
def in_words(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Says in a line what a store refused; errors at local paths stay as they are."""
    try:
        yield
    except (UserError, AssertionError):
        raise
    except Exception as error:  # the packages underneath have no one kind of error
        if not is_remote(path):
            raise
        raise UserError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    kind, text = type(error).__name__, " ".join(str(error).split())
    code = getattr(error, "code", None) or getattr(error, "status", None)
    text = text if len(text) <= 160 else text[:157] + "..."
    if "Credentials" in kind:
        return f"there are no credentials for it ({text}); docs/launch.md says where they are looked for"
    if isinstance(error, PermissionError) or code in (401, 403, "401", "403"):
        return f"access is denied ({text or kind})"
    if isinstance(error, TimeoutError) or "Timeout" in kind:
        return f"the store did not answer for {_SECONDS_TO_ANSWER} s"
    if isinstance(error, ConnectionError) or "Connect" in kind:
        return f"the store cannot be reached ({text or kind})"
    return f"{kind}: {text}" if text else kind


def created(path: Path, text: str) -> bool:
    """Writes an object where there is none; False where there is one. Of several that try, one has True."""
    try:
        filesystem(path).pipe_file(os.fspath(path), text.encode(), mode="create")
    except FileExistsError:
        return False
    return True


def read_bytes(path: str | os.PathLike, most: int) -> bytes:
    """What is in an object.

    Raises:
      FileNotFoundError: there is none.
      UserError: it is a folder, or has more than `most` bytes.
      Exception: whatever the package underneath has for a store that cannot be read, see `in_words`.
    """
    store, where = filesystem(path), os.fspath(path)
    found = store.info(where)
    if found["type"] != "file":
        raise UserError(f"{path}: is no file but a folder")
    if (size := int(found["size"])) > most:
        raise UserError(f"{path}: has {size} bytes; no more than {most} are read")
    return store.cat_file(where)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes an object, whole."""
    filesystem(path).pipe_file(os.fspath(path), content)


def listing(folder: Path) -> dict[str, Stored]:
    """Every object below a folder: {name below it: what the store says}; {} where there is none."""
    prefix = os.fspath(folder).partition("://")[2].rstrip("/") + "/"
    found = filesystem(folder).find(os.fspath(folder), detail=True)
    return {
        name.removeprefix(prefix): stored(entry)
        for name, entry in sorted(found.items())
        if name.startswith(prefix) and not name.endswith("/")  # a browser's mark of an empty folder
    }


def stored(entry: dict[str, Any]) -> Stored:
    """An entry of fsspec."""
    checksum = f"crc32c:{entry['crc32c']}" if "crc32c" in entry else str(entry.get("ETag", "")).strip('"')
    return Stored(int(entry["size"]), checksum)


def move(source: Path, target: Path) -> None:
    """Moves a folder; in a store object by object, all copied before the first is removed."""
    if not is_remote(source):
        source.rename(target)
        return
    store, names = filesystem(source), list(listing(source))
    for name in names:
        store.cp_file(f"{source}/{name}", f"{target}/{name}")
    for name in names:
        store.rm_file(f"{source}/{name}")


def remove_tree(folder: Path) -> None:
    """Removes a folder of a store with all that is in it."""
    filesystem(folder).rm(os.fspath(folder), recursive=True)
