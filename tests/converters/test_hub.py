"""Where a checkpoint is found: folders, folders of the Hugging Face cache, the Hub and its answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from converters.hub import find_checkpoint
from lsg_jax.errors import InputError

FIRST, SECOND = "a1" * 20, "b2" * 20


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A folder of the cache with two snapshots, and a reference to the second."""
    folder = tmp_path / "models--owner--some-name"
    for commit in (FIRST, SECOND):
        (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(SECOND)
    (folder / "refs/old").write_text(FIRST)
    return folder


def test_an_empty_name_is_no_folder() -> None:
    with pytest.raises(InputError, match="the checkpoint's name is empty"):
        find_checkpoint("")


def test_a_folder_of_the_cache_stands_for_its_snapshot(cached: Path) -> None:
    found = find_checkpoint(cached)
    assert (found.folder, found.name, found.revision) == (cached / "snapshots" / SECOND, "owner/some-name", SECOND)
    for revision in ("old", FIRST, FIRST[:7]):
        assert find_checkpoint(cached, revision=revision).revision == FIRST
    inside = find_checkpoint(cached / "snapshots" / FIRST)
    assert (inside.name, inside.revision) == ("owner/some-name", FIRST)
    (cached / "refs/main").unlink()
    with pytest.raises(InputError, match=f"no snapshot of revision main; it has {FIRST}, {SECOND}"):
        find_checkpoint(cached)
    with pytest.raises(InputError, match="no snapshot of revision v2"):
        find_checkpoint(cached, revision="v2")
    with pytest.raises(InputError, match="is the snapshot of another revision"):
        find_checkpoint(cached / "snapshots" / FIRST, revision="v2")


def test_one_snapshot_without_a_reference_is_taken(cached: Path) -> None:
    (cached / "refs/main").unlink()
    (cached / "snapshots" / FIRST).rmdir()
    assert find_checkpoint(cached).revision == SECOND
    (cached / "snapshots" / SECOND).rmdir()
    with pytest.raises(InputError, match="without a snapshot; fetch it with `hf download owner/some-name`"):
        find_checkpoint(cached)


def test_a_local_folder_has_no_revision(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path).revision is None
    with pytest.raises(InputError, match="a local folder has no revisions; leave --revision out"):
        find_checkpoint(tmp_path, revision="main")


def test_folders_that_lsg_wrote_are_called_by_what_they_are(tmp_path: Path) -> None:
    for name, message in (
        ("lsg_manifest.json", "is a model folder, converted already"),
        ("run.json", "is a run folder, .*--gates"),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(InputError, match=rf"{folder}: {message}"):
            find_checkpoint(folder)
        (folder / "config.json").write_text("{}")
        assert find_checkpoint(folder).folder == folder  # a checkpoint in which others left such a file


def test_a_revision_is_passed_on_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshots" / FIRST
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    asked: list[dict[str, Any]] = []

    def download(repository: str, **options: Any) -> str:
        asked.append({"repository": repository, "revision": options.get("revision")})
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_checkpoint("owner/name", revision="v1.2").revision == FIRST
    assert asked == [{"repository": "owner/name", "revision": "v1.2"}]


def answered(kind: type[HfHubHTTPError], status: int, **headers: str) -> HfHubHTTPError:
    return kind(
        f"{status} Client Error.\n\nlong text", response=SimpleNamespace(status_code=status, headers=headers, request=None)
    )


def behind(error: Exception) -> Exception:
    """As `snapshot_download` wraps an answer that it does not know."""
    outer = LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            answered(GatedRepoError, 403),
            "answered 403: the repository is gated; accept its terms at https://huggingface.co/o/n",
        ),
        (answered(GatedRepoError, 401), "answered 401: the repository is gated; .* run `hf auth login`"),
        (answered(RepositoryNotFoundError, 401), "answered 401: no such repository, or a private one; check its name"),
        (behind(answered(HfHubHTTPError, 403)), "answered 403: your token may not read this repository; run `hf auth login`"),
        (answered(RepositoryNotFoundError, 404), "answered 404: no such repository; check its name"),
        (answered(RevisionNotFoundError, 404), "answered 404: the repository has no revision v9; look it up"),
        (behind(answered(HfHubHTTPError, 429)), "answered 429: too many requests; wait a few minutes and run it again"),
        (answered(HfHubHTTPError, 429, **{"Retry-After": "90"}), "answered 429: too many requests; wait 90 seconds"),
        (answered(HfHubHTTPError, 503), "answered 503: it has trouble; run it again later, see https://status.huggingface.co"),
        (behind(answered(HfHubHTTPError, 500)), "answered 500: it has trouble; run it again later"),
        (answered(HfHubHTTPError, 409), "could not be fetched from the Hugging Face Hub: 409 Client Error"),
        (
            PermissionError(13, "Permission denied", "/cache/models--o--n"),
            "/cache/models--o--n: Permission denied; check it and its free space, or name another folder in HF_HOME",
        ),
        (OSError(28, "No space left on device"), "the cache: No space left on device; check it and its free space, or name"),
        (
            UnicodeEncodeError("ascii", "Bearer t\xf6", 8, 9, "ordinal not in range"),
            "the token holds a character that no token has; set HF_TOKEN anew, or run `hf auth login`",
        ),
        (
            LocalEntryNotFoundError("Cannot find it; set HF_HUB_OFFLINE=0"),
            "could not be fetched .*: HF_HUB_OFFLINE is set; unset it",
        ),
    ],
)
def test_answers_of_the_hub_say_what_to_do(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match=message) as caught:
        find_checkpoint("o/n", revision="v9")
    assert str(caught.value).startswith("o/n: ") and "\n" not in str(caught.value)
