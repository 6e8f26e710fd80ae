"""Gate files on the Hugging Face Hub, and what its refusals mean."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lsg_jax.checkpoint.problem import first_line
from lsg_jax.errors import InputError

GATE_FILE = "gates.safetensors"
"""Name of the gate file in a repository."""

REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*"
"""Pattern of a Hub id such as owner/name."""


@dataclass(frozen=True)
class HubName:
    """`owner/name`, or `owner/name@revision`: branch, tag or commit. Without one, the newest commit of `main`."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


@dataclass(frozen=True)
class HubFile:
    """A gate file in the cache.

    Attributes:
        file: where it is on this machine.
        repository: Hub id. commit: of which it is, in full.
    """

    file: Path
    repository: str
    commit: str

    @property
    def origin(self) -> str:
        """`owner/name@commit`, which names the same file for good."""
        return f"{self.repository}@{self.commit}"


def on_hub(source: str | Path) -> HubName | None:
    """The Hub id that `source` stands for; None for a local path.

    Whatever exists here is local, also as PATH@LAYERS, and so is every name that ends in `.safetensors` or begins with a folder
    that exists here, such as `runs/` of a mistyped run. Behind a Hub id, all that follows `@` is a revision, numbers too.
    """
    text = str(source)
    match = re.fullmatch(rf"({REPOSITORY})(?:@(.+))?", text)
    if match is None or match[1].endswith(".safetensors"):
        return None
    if any(Path(local).exists() for local in (text, text.rpartition("@")[0], text.partition("/")[0]) if local):
        return None
    return HubName(match[1], match[2])


def download_gates(name: HubName) -> HubFile:
    """Fetches the gate file of a repository into the usual cache; from the cache alone without a network.

    Raises:
        InputError: no such repository, revision or file, no permission, or no network and nothing in the cache.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

    sought = "no such run folder or gate file"
    try:
        file = Path(hf_hub_download(name.repository, GATE_FILE, revision=name.revision))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise InputError(failure(name.repository, name.revision, error, sought=sought)) from None
        advice = "choose a repository that `lsg gates push` has written, or another revision of it"
        raise InputError(f"{name}: the repository on the Hugging Face Hub holds no {GATE_FILE}; {advice}") from None
    except (OSError, ValueError, HTTPError) as error:
        raise InputError(failure(name.repository, name.revision, error, sought=sought)) from None
    return HubFile(file, name.repository, file.parent.name)


@contextlib.contextmanager
def reading(found: HubFile) -> Iterator[None]:
    """Within the block, an InputError of the file's content also says where on the Hub the file is from."""
    try:
        yield
    except InputError as error:
        advice = "if only the copy in the cache is broken, delete it, and it is fetched again"
        raise InputError(f"{found.origin}: {error}; {advice}") from None


def failure(repository: str, revision: str | None, error: Exception, *, sought: str) -> str:
    """What went wrong when something was fetched from the Hub and what to do, in one line.

    Args:
        sought: what the name is not on this machine, such as `no such folder`.
    """
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    http, status = answer_of(error)
    where = f"{repository}: {sought}, and the Hugging Face Hub answered {status}"
    page = f"https://huggingface.co/{repository}"
    if isinstance(http, GatedRepoError):
        return f"{where}: the repository is gated; accept its terms at {page} and run `hf auth login`"
    if isinstance(http, RevisionNotFoundError):
        return f"{where}: the repository has no revision {revision}; look it up at {page}/commits"
    if status == 401:
        return f"{where}: no such repository, or a private one; check its name, and for a private one run `hf auth login`"
    if status == 403:
        return f"{where}: your token may not read this repository; run `hf auth login` with one that may"
    if status == 404:
        return f"{where}: no such repository; check its name"
    if (later := not_now(http)) is not None:
        return f"{where}: {later}"
    return f"{repository}: {sought}, and it could not be fetched from the Hugging Face Hub: {unanswered(error)}"


def answer_of(error: Exception) -> tuple[Exception | None, int | None]:
    """The error with which the Hub answered, if it did, which may be the cause of another one; and its HTTP status."""
    from huggingface_hub.errors import HfHubHTTPError

    http = next((e for e in (error, error.__cause__) if isinstance(e, HfHubHTTPError)), None)
    return http, getattr(getattr(http, "response", None), "status_code", None)


def not_now(http: Exception | None) -> str | None:
    """What to do after an answer that may be another one later; None for other answers."""
    response = getattr(http, "response", None)
    status = getattr(response, "status_code", 0)
    if status == 429:
        after = response.headers.get("Retry-After")  # type: ignore[union-attr]
        wait = f"{after} seconds" if after else "a few minutes"
        return f"too many requests; wait {wait} and run it again (`hf auth login` raises the limit)"
    return "it has trouble; run it again later, see https://status.huggingface.co" if status >= 500 else None


def unanswered(error: Exception) -> str:
    """Why the Hub was not asked or gave no answer that is known, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    http, _ = answer_of(error)
    if isinstance(error, UnicodeEncodeError):
        return "the token holds a character that no token has; set HF_TOKEN anew, or run `hf auth login`"
    if http is None and isinstance(error, OSError) and error.errno is not None:
        place = "the cache" if error.filename is None else error.filename
        return f"{place}: {error.strerror}; check it and its free space, or name another folder in HF_HOME"
    if http is None and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it to ask the Hub"
    lost = next((e for e in (error, error.__cause__) if isinstance(e, HTTPError)), None)
    if http is None and lost is not None:
        return f"{constants.ENDPOINT} cannot be reached: {first_line(lost)}; check the network and run it again"
    return first_line(http or error)
