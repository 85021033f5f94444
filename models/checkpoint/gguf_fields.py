"""Checked reading of a GGUF file's settings, which follow the name of its architecture."""

from typing import Any

import numpy as np

from models.checkpoint.gguf_file import GgufFile
from models.errors import InputError
from models.untrusted import LARGEST, is_count, shown

REMEDY = "use the original Hugging Face checkpoint"


class Settings:
    """Settings of one architecture in a file, such as `llama.block_count`.

    Args:
      file: The file.
      kind: Its architecture.
    """

    def __init__(self, file: GgufFile, kind: str):
        self.file, self.kind = file, kind

    def get(self, key: str) -> Any:
        """Return a setting unchecked, None where the file has none.

        Args:
          key: Name of the setting, without the architecture.
        """
        return self.file.metadata.get(f"{self.kind}.{key}")

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return a count.

        Args:
          key: As in `get`.
          default: Value where the file has none; None where it must have one.
          least: Smallest value.

        Raises:
          InputError: The value is no count.
        """
        value = self._typed(key, int, default)
        if not is_count(value, least):
            raise InputError(
                f"{self.file.path}: metadata {self.kind}.{key} is {value}, not a positive number "
                "of 32 bits",
                "download it again",
            )
        return value

    def number(self, key: str, default: float | None = None, least: float = 1e-30) -> float:
        """Return a number, in the shortest decimal of the same float32.

        Args:
          key: As in `get`.
          default: As in `count`.
          least: Smallest value.

        Raises:
          InputError: The value is no finite number of at least `least`.
        """
        value = self._typed(key, float, default)
        if not least <= value <= LARGEST:
            raise InputError(
                f"{self.file.path}: metadata {self.kind}.{key} is {value}, not a positive number",
                "download it again",
            )
        # 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value)))

    def optional_number(self, key: str) -> float | None:
        """Return a number, None where the file has none or 0.

        Args:
          key: As in `get`.
        """
        return self.number(key, 0.0, least=0.0) or None

    def _typed(self, key: str, kind: type, default: Any) -> Any:
        return typed(self.file, f"{self.kind}.{key}", kind, default)


def typed(file: GgufFile, key: str, kind: type, default: Any = None) -> Any:
    """Return a value of the metadata.

    Args:
      file: The file.
      key: Whole name.
      kind: Type that it must have.
      default: Value where the file has none.

    Raises:
      InputError: The value is absent or of another type.
    """
    value = file.metadata.get(key, default)
    if type(value) is not kind:
        raise InputError(
            f"{file.path}: metadata {key} is {shown(value)}, not one {kind.__name__}", REMEDY
        )
    return value
