"""Whose code o2o runs: that which the user named, registered environments, and what the files vouch for.

Run folders and datasets name code: an environment's module, a base policy. A file from elsewhere may name any. What the
user of this machine names in a run or records is vouched for in the file, with a key that only this user has; so own
runs and datasets need no word. All other code runs only if the user says so: `--trust`, or O2O_TRUSTED_FOLDERS.
"""

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Any

from platformdirs import user_data_path

from o2o.user_code import origin

FOLDERS = "O2O_TRUSTED_FOLDERS"
"""Environment variable: folders, as in PATH, whose runs and datasets may name any code."""
HOW = f"if you trust who made it, put its folder into {FOLDERS}, or say --trust on the command line"


def everywhere() -> None:
    """Trust all files, in this process and in those that it starts."""
    os.environ[FOLDERS] = os.sep


def trusted(folder: Path) -> bool:
    """Whether a folder lies in one of O2O_TRUSTED_FOLDERS."""
    roots = [Path(root).expanduser().resolve() for root in os.environ.get(FOLDERS, "").split(os.pathsep) if root]
    return any(folder.resolve().is_relative_to(root) for root in roots)


def voucher(code: list[str], about: Any = None) -> str | None:
    """Return what proves later that this user named `code`, with `about` (JSON-able); None if no key can be kept.

    It holds for the files that the names lead to now, so that others of the same name are other code.
    """
    if (key := _key(make=True)) is None:
        return None
    return _sign(key, code, about)


def vouched(proof: Any, code: list[str], about: Any = None) -> bool:
    """Whether `proof` is a voucher of this user for `code` and `about`."""
    key = _key(make=False)
    return (
        key is not None
        and isinstance(proof, str)
        and proof.isascii()
        and hmac.compare_digest(proof.encode(), _sign(key, code, about).encode())
    )


def secret(purpose: str) -> bytes | None:
    """Return a key for a purpose that only this user has on this machine; None if none can be kept."""
    key = _key(make=True)
    return None if key is None else hmac.digest(key, f"o2o {purpose}".encode(), "sha256")


def _sign(key: bytes, code: list[str], about: Any) -> str:
    text = json.dumps([code, [origin(name) for name in code], about], sort_keys=True, default=str)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key(make: bool) -> bytes | None:
    """Return this user's key. If there is none, make one or return None; it is whole at once for other processes."""
    path = user_data_path("o2o", appauthor=False) / "key"
    try:
        if make and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".key.{secrets.token_hex(8)}")
            with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            try:
                os.link(new, path)
            except FileExistsError:
                pass
            finally:
                new.unlink()
        key = path.read_bytes()
    except OSError:
        return None
    return key if len(key) == 32 else None
