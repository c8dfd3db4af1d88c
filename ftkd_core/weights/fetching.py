# SPDX-License-Identifier: Apache-2.0
"""Download a file in parts that can be resumed, and check its hash.

The unfinished file is `NAME.partial`; `NAME.partial.json` has its address and the server's tag of its
content, so that parts of two versions are never joined.
"""

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from ftkd_core.errors import UserError
from ftkd_core.json_files import write_json
from ftkd_core.weights.public_files import PUBLIC_FILES, PublicFile

_BLOCK: Final = 1 << 20
_TRIES: Final = 4
_TIMEOUT_S: Final = 30.0
_PAUSE_S: float = 1.0  # before the second try; doubled before each further one


def find_file(name: str) -> PublicFile:
    """Return the public file of a name. Raise UserError that lists the known names."""
    if name not in PUBLIC_FILES:
        raise UserError(f"no public file {name!r}; expected one of {', '.join(PUBLIC_FILES)}")
    return PUBLIC_FILES[name]


def fetch(public: PublicFile, folder: Path, url: str = "", sha256: str = "") -> tuple[Path, str]:
    """Download a file into a folder, or resume, unless it is there; return its path and what was checked.

    url replaces its address, sha256 its hash. Raise UserError if the address cannot be reached, the
    connection is cut again and again, the hash is wrong, or the address is a page for a browser.
    """
    path, expected = folder / public.file, (sha256 or public.sha256).lower()
    if any(digit not in "0123456789abcdef" for digit in expected) or len(expected) > 64:
        raise UserError(f"SHA-256 {expected!r}: expected up to 64 hexadecimal digits")
    if not path.exists():
        if not (url or public.direct):
            raise UserError(by_hand(public, folder))
        folder.mkdir(parents=True, exist_ok=True)
        _download(url or public.url, path, public, folder)
    return path, check(path, expected, public)


def by_hand(public: PublicFile, folder: Path) -> str:
    """Return how to get a file without this command."""
    return (
        f"download {public.url} with a browser, put it at {str(folder / public.file)!r}, and run the same "
        "command again to check it"
    )


def check(path: Path, expected: str, public: PublicFile) -> str:
    """Return a sentence on the hash of a file. Raise UserError, and set the file aside, if it is wrong."""
    found = file_hash(path)
    if not expected:
        return f"SHA-256 {found}: could not be checked, because none is published"
    if not found.startswith(expected):
        aside = path.with_name(f"{path.name}.wrong")
        path.replace(aside)
        raise UserError(
            f"{str(path)!r} has SHA-256 {found}; expected {expected}{'...' * (len(expected) < 64)}: it is "
            f"another file or damaged; it was moved to {aside.name}. Run the command again"
        )
    if len(expected) < 64:
        return f"SHA-256 {found}: begins with {expected} as expected ({public.hash_source})"
    source = public.hash_source if expected == public.sha256 else "given"
    return f"SHA-256 {found}: as expected ({source})"


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _download(url: str, path: Path, public: PublicFile, folder: Path) -> None:
    """Download into `NAME.partial` with several tries, then rename."""
    partial, pause = path.with_name(f"{path.name}.partial"), _PAUSE_S
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(pause)
            pause *= 2
        try:
            with _progress(path.name) as bar:
                whole = _append(url, partial, bar)
        except urllib.error.HTTPError as error:
            raise UserError(
                f"{url}: the server answers {error.code} {error.reason}; {by_hand(public, folder)}"
            ) from None
        except urllib.error.URLError as error:
            raise UserError(f"{url} cannot be reached ({error.reason}); {by_hand(public, folder)}") from None
        except ValueError as error:
            raise UserError(f"address {url!r}: {error}") from None
        except (http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
                raise  # of the file, not of the connection
            whole = False
        if whole:
            partial.replace(path)
            _tag_file(partial).unlink(missing_ok=True)
            return
    size = partial.stat().st_size if partial.exists() else 0
    raise UserError(
        f"{url}: the connection was cut {_TRIES} times; {size} bytes are in {str(partial)!r}. Run the same "
        f"command to resume, or {by_hand(public, folder)}"
    )


def _append(url: str, partial: Path, bar: "tqdm[Any]") -> bool:
    """Append to an unfinished file what it lacks; return whether it is complete."""
    start = partial.stat().st_size if partial.exists() else 0
    known = _read_tag(partial)
    request = urllib.request.Request(url, headers={"User-Agent": "ftkd"})
    if start and known.get("url") == url and known.get("tag"):
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", str(known["tag"]))
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return True  # all bytes were there already
        partial.unlink()
        return False
    with response:
        resumes = response.status == http.client.PARTIAL_CONTENT and _first_byte(response) == start
        if response.status == http.client.PARTIAL_CONTENT and not resumes:
            partial.unlink()
            return False
        start = start if resumes else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        write_json(_tag_file(partial), {"url": url, "tag": "" if tag.startswith("W/") else tag})
        bar.reset(total)
        bar.update(start)
        with partial.open("ab" if resumes else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
    return total is None or partial.stat().st_size == total


def _first_byte(response: Any) -> int:
    """Return the first byte of a partial response, -1 if it does not say."""
    text = response.headers.get("Content-Range", "").removeprefix("bytes ").split("-")[0]
    return int(text) if text.isdigit() else -1


def _tag_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _read_tag(partial: Path) -> dict[str, Any]:
    try:
        found = json.loads(_tag_file(partial).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _progress(name: str) -> Iterator["tqdm[Any]"]:
    with tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1000) as bar:
        yield bar
