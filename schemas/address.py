"""A server's address as a recipe may hold it: recipes are kept in the run folder, so no secret in it."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator


def without_secret(url: str) -> str:
    """The address. ValueError if it is none of a server, or holds a user, a password or a query."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected http(s)://host:port, and /v1 where the server has it")
    if parts.username or parts.password or parts.query:
        raise ValueError("give the address alone: a key belongs in the environment variable that api_key_env names")
    return url


Address = Annotated[str, AfterValidator(without_secret)]
