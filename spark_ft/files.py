"""Where the project and its cache lie, and files that are written whole or not at all."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("SPARK_FT_CACHE", ROOT / ".cache" / "spark_ft"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all, even if the process is killed: `write(temporary)`, flush, rename.

    Raises:
        OSError: it could not be written, as when the disk is full; what stood at `path` still stands.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        if "No space left" in str(error):  # safetensors wraps the system's error into its own
            raise OSError(
                errno.ENOSPC, f"{path}: no disk space to write it; free some and run again"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
