"""Files that are not plain text: compressed ones and tables; what they need beyond the standard library is optional."""

import gzip
import importlib
import pathlib
import zlib

from oasis_jax.errors import UserError, unknown_name


def _gunzip(content: bytes, where: str) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{where}: cannot be decompressed: {error}") from None


def _unzstd(content: bytes, where: str) -> bytes:
    zstandard = optional("zstandard", where)
    try:
        return zstandard.ZstdDecompressor().decompressobj().decompress(content)
    except zstandard.ZstdError as error:
        raise UserError(f"{where}: cannot be decompressed: {error}") from None


# Last suffix of a compressed file -> (bytes, where) -> bytes
PACKED = {".gz": _gunzip, ".zst": _unzstd}


def parquet_texts(path: pathlib.Path, key: str) -> list[bytes]:
    """The texts of a column; raises UserError, listing the columns there are, where there is no such one."""
    pyarrow = optional("pyarrow", str(path))
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                raise unknown_name(f"{path}: data.text_key", key, file.schema_arrow.names)
            kind = file.schema_arrow.field(key).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{path}: the column {key!r} is not text but {kind}")
            column = file.read(columns=[key])[key]
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    return [text.encode() for text in column.to_pylist() if text is not None]


def optional(package: str, where: str, extra: str = "prepare"):
    """A package that only some formats need; raises UserError, which names the extra, where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{where}: reading it needs {package}; pip install 'oasis_jax[{extra}]'") from None
