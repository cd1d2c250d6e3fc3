"""API keys: a file with the name, the hash and the scopes of each; the keys themselves are nowhere."""

import hashlib
import hmac
import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from upath import UPath

from sprue.errors import SprueError
from sprue.formats import KEYS
from sprue.serving.access_writer import AccessWriter
from sprue.serving.errors import ApiError
from sprue.serving.rates import PATTERN, Rate, RateLimiter
from sprue.store import write_json

logger = logging.getLogger(__name__)

Scope = Literal["score", "review", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""``score``: classes and scores. ``review``: past decisions with their images, and verdicts on them. ``admin``: what is
wrong with the service."""


@dataclass(frozen=True)
class Caller:
    """Who makes a request.

    Attributes:
        key: From its header ``Authorization: Bearer``; None without one.
        address: Of the client; of a proxy in front of the service, unless that is on this machine and names it.
        request: Method and path.
    """

    key: str | None
    address: str
    request: str


_Bearer: TypeAlias = Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))]


async def _caller(request: Request, bearer: _Bearer) -> Caller:
    address = request.client.host if request.client else ""
    return Caller(bearer.credentials if bearer else None, address, f"{request.method} {request.url.path}")


Credentials: TypeAlias = Annotated[Caller, Depends(_caller)]
"""A request's caller, as an argument of a route."""


class Key(BaseModel):
    """A key that the service accepts.

    Attributes:
        name: Whose it is, for people.
        sha256: Of the key, in hexadecimal. Keys are random, so that their hashes need no salt.
        scopes: What it may do.
        rate: How many requests it may make, such as ``20/s``; None for as many as the service's own limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...] = Field(min_length=1)
    rate: Annotated[str, Field(pattern=PATTERN)] | None = None


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: tuple[Key, ...]

    @field_validator("keys")
    @classmethod
    def _names_differ(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        if len({key.name for key in keys}) < len(keys):
            raise ValueError("two keys have the same name")
        return keys


def read_keys(path: Path) -> tuple[Key, ...]:
    """Reads a file of keys.

    Raises:
        SprueError: If it is missing or malformed; the message names the field.
    """
    try:
        content = KEYS.current(json.loads(path.read_bytes()), path)
        return _Keys.model_validate_json(json.dumps(content)).keys
    except OSError as error:
        raise SprueError(f"the keys can't be read: {error}; make a first one with `sprue keys add`") from error
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise SprueError(f"{path} is no file of keys: {place}: {first['msg']}") from error
    except ValueError as error:
        raise SprueError(f"{path} is no file of keys: the file: invalid JSON: {error}") from error


def add_key(path: Path, name: str, scopes: Sequence[Scope], rate: str | None = None) -> str:
    """Adds a new key to a file, which is made if it is missing, and returns it; only its hash is kept.

    Raises:
        SprueError: If there is a key of that name, or the name, the rate or the file is malformed.
    """
    if rate is not None:
        Rate.of(rate)
    key = f"sprue_{secrets.token_urlsafe(32)}"

    def add(keys: tuple[Key, ...]) -> tuple[Key, ...]:
        if any(each.name == name for each in keys):
            raise SprueError(f"{path} has a key {name!r} already; remove it first, or add one under another name")
        try:
            return (*keys, Key(name=name, sha256=_hash(key), scopes=tuple(dict.fromkeys(scopes)), rate=rate))
        except ValidationError as error:
            message = f"a key's name has letters, digits, dots, dashes and underscores, at most 64: {name!r} has not"
            raise SprueError(message) from error

    _change(path, add)
    return key


def remove_key(path: Path, name: str) -> None:
    """Removes a key from a file.

    Raises:
        SprueError: If there is none of that name, or the file is missing or malformed.
    """

    def remove(keys: tuple[Key, ...]) -> tuple[Key, ...]:
        kept = tuple(key for key in keys if key.name != name)
        if len(kept) == len(keys):
            raise SprueError(f"{path} has no key {name!r}; it has: {', '.join(key.name for key in keys) or 'none'}")
        return kept

    _change(path, remove)


def _change(path: Path, change: Callable[[tuple[Key, ...]], tuple[Key, ...]]) -> None:
    with FileLock(path.with_name(f".{path.name}.lock")):
        keys = change(read_keys(path) if path.exists() else ())
        before = path.stat() if path.exists() else None
        umask = os.umask(0o077)
        try:
            rows = [key.model_dump(mode="json", exclude_none=True) for key in keys]
            write_json(UPath(path), KEYS.stamped({"keys": rows}))
        finally:
            os.umask(umask)
        if before:  # so that a service of another user can still read it
            os.chown(path, before.st_uid, before.st_gid)
            path.chmod(before.st_mode & 0o777)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class KeyFile:
    """The keys of a file, which is read again when it changes; without a file, everybody may do everything.

    Where there are keys each has its rate limit, otherwise each address.
    """

    def __init__(
        self,
        path: Path | None,
        rate: Rate | None = None,
        limiter: RateLimiter | None = None,
        log: AccessWriter | None = None,
    ) -> None:
        """Reads the file; `rate` is that of keys without one of their own, and of addresses.

        Raises:
            SprueError: If it is missing or malformed.
        """
        self.error: str | None = None
        """Why the file could not be read again; the keys before are valid until then."""
        self._path, self._state = path, _state(path)
        self._rate, self._limiter, self._log = rate, limiter or RateLimiter(), log
        self._keys = read_keys(path) if path else ()

    def allows(self, caller: Caller, scope: Scope) -> bool:
        """Whether a request may do what needs a scope; it does not count towards a rate limit."""
        if self._path is None:
            return True
        key = self._find(caller)
        if key is None or scope not in key.scopes:
            return False
        self._note(key, caller, (scope,))
        return True

    def require(self, caller: Caller, *scopes: Scope) -> str:
        """Refuses a request that may not do what needs all of the scopes, or comes too soon after others.

        Returns:
            Its key's name, empty where there are no keys.

        Raises:
            ApiError: 401 without a known key, 403 with one that has other scopes, 429 beyond its rate limit.
        """
        if self._path is None:
            self._count(caller.address, f"the address {caller.address}", self._rate)
            return ""
        key = self._find(caller)
        if key is None:
            message = "send a key of this service in the header Authorization: Bearer KEY"
            raise ApiError(HTTPStatus.UNAUTHORIZED, "unauthorized", message, {"WWW-Authenticate": "Bearer"})
        for scope in scopes:
            if scope not in key.scopes:
                message = f"the key {key.name!r} has not the scope {scope!r}; it has: {', '.join(key.scopes)}"
                raise ApiError(HTTPStatus.FORBIDDEN, "forbidden", message)
        self._count(key.name, f"the key {key.name!r}", Rate.of(key.rate) if key.rate else self._rate)
        self._note(key, caller, scopes)
        return key.name

    def _count(self, client: str, name: str, rate: Rate | None) -> None:
        if rate is None or not (wait_s := self._limiter.wait_s(client, rate)):
            return
        retry_s = math.ceil(wait_s)
        message = f"{name} may make {rate}; try again in {retry_s} s"
        raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, "rate_limited", message, {"Retry-After": str(retry_s)})

    def _note(self, key: Key, caller: Caller, scopes: Sequence[Scope]) -> None:
        if self._log and "admin" in scopes:
            self._log.add_once("admin", key.name, caller.address, caller.request)

    def _find(self, caller: Caller) -> Key | None:
        if caller.key is None:
            return None
        self._follow()
        presented, found = _hash(caller.key), None
        for key in self._keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(presented, key.sha256):
                found = key
        return found

    def _follow(self) -> None:
        if (state := _state(self._path)) == self._state:
            return
        self._state = state
        try:
            assert self._path is not None
            self._keys, self.error = read_keys(self._path), None
        except SprueError as error:
            self.error = str(error)
            logger.error("keeping the present keys: %s", error)


def _state(path: Path | None) -> tuple[int, ...] | None:
    """What changes with a file's content, or with who may read it."""
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino) if found else None
