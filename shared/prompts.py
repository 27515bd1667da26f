"""Prompts for people's eyes: a text file with one on each line, read alike by the builder and by generation."""

from pathlib import Path

from shared.errors import ConfigError, DataError


def read_prompts_file(path: Path) -> list[str]:
    """The lines of a UTF-8 file that hold something; raises ConfigError (cannot be read) or DataError (not text)."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"--prompts {path}: {error.strerror}") from None
    return [stripped for line in lines if (stripped := line.strip())]
