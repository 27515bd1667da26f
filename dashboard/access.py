"""Who may read the page: names it is reached by, and a token wherever others than this machine could ask.

A browser on this machine can be led to 127.0.0.1 by any page (DNS rebinding), but not under a name of ours: requests
with another Host are refused. A token comes in a header, or once as ?token= and from then on in a cookie.
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
LEAST_TOKEN = 16  # characters
COOKIE = "sdxl_experts_page"
_HOST = re.compile(r"(\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(:[0-9]{1,5})?")


@dataclass(frozen=True)
class Access:
    """Names that the page answers to, and the token that it asks for, if any."""

    names: frozenset[str]
    token: str | None = None

    def allows_host(self, host: str) -> bool:
        """Whether a Host header, with or without a port, is one of ours."""
        found = _HOST.fullmatch(host)
        return found is not None and (found["six"] or found["name"]).lower() in self.names

    def is_token(self, shown: str) -> bool:
        """Whether `shown` is the token, compared in constant time."""
        return self.token is None or hmac.compare_digest(shown.encode(), self.token.encode())

    def is_cookie(self, shown: str) -> bool:
        """Whether `shown` is what `cookie` gives."""
        return self.token is None or hmac.compare_digest(shown.encode(), self.cookie().encode())

    def cookie(self) -> str:
        """What a browser keeps in place of the token, from which the token cannot be told."""
        return hashlib.blake2b((self.token or "").encode(), digest_size=16, person=b"page cookie").hexdigest()


def choose_access(host: str, token_file: Path | None, allowed: Sequence[str]) -> Access:
    """Who may read a page that is served on `host`; raises ConfigError where that needs a token and there is none."""
    token = None if token_file is None else _read_token(token_file)
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines: name a file with a token, --token-file FILE "
            "(a line of 16 characters or more, such as openssl rand -hex 16 prints)"
        )
    own = set() if host in ("0.0.0.0", "::") else {host.lower()}
    return Access(frozenset(LOOPBACK_NAMES | own | {name.strip("[]").lower() for name in allowed}), token)


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _read_token(file: Path) -> str:
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"--token-file {file}: {why}") from None
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable():
        raise ConfigError(f"--token-file {file}: a token is one line of {LEAST_TOKEN} or more printable characters")
    return token
