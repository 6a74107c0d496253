"""Files that appear whole or not at all: written under a temporary name beside their place, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gossamer.errors import OutputError


@contextmanager
def whole(path: Path, what: str = "") -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends; readers see the old file or the new one.

    The folder is made. After an interruption or an error nothing is left of it.

    Args:
        what: for the message, as "the calibration".

    Raises:
        OutputError: the folder or file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {f'{what} to ' if what else ''}{path}: {reason}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str, what: str = "") -> Path:
    """Write a text file, see `whole`; returns its path."""
    path = Path(path)
    with whole(path, what) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, what: str = ""
) -> Path:
    """Write a safetensors file, see `whole`; returns its path. Tensors may lie in any way, but not share memory."""
    path = Path(path)
    with whole(path, what) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    return path
