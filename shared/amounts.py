"""Bytes, seconds and counts as people read them; programs are given the numbers."""


def size_text(size_bytes: float) -> str:
    """Bytes in binary units: 566.5 KiB."""
    units = ("KiB", "MiB", "GiB", "TiB")
    if size_bytes < 1024:
        return f"{size_bytes:.0f} B"
    for unit in units:
        size_bytes /= 1024
        if size_bytes < 1024 or unit == units[-1]:
            break
    return f"{size_bytes:.1f} {unit}"


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count_text(count: int, one: str) -> str:
    """How many there are of what is called `one`: 1 record, 2 records."""
    return f"{count} {one}" if count == 1 else f"{count} {one}s"
