"""`lsg gates push`: uploads gates with their sink settings and a model card to the Hugging Face Hub, in one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsg_jax.checkpoint.problem import first_line
from lsg_jax.checkpoint.processes import tree_sha256
from lsg_jax.checkpoint.run_record import RUN
from lsg_jax.config import to_dict
from lsg_jax.errors import InputError, LsgError
from lsg_jax.gating.portable import gate_bytes
from lsg_jax.hub import GATE_FILE, REPOSITORY, answer_of, not_now, on_hub, unanswered
from lsg_jax.opening import open_gates, split_layers
from lsg_jax.sharing.card import Shared, model_card, toml_lines
from lsg_jax.sharing.made import made_by
from lsg_jax.sharing.scores import find_scores

CARD = "README.md"
SINKS = "sinks.toml"
MESSAGE = "Upload gates of lsg_jax"


@dataclass(frozen=True)
class Pushed:
    """What was written to the Hub.

    Attributes:
        repository: Hub id. commit: in full. url: of the commit.
    """

    repository: str
    commit: str
    url: str


def push_gates(
    source: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    evaluation: Path | None = None,
    base_model: str | None = None,
) -> Pushed:
    """Uploads gates. Everything is read and made before the Hub is asked for anything.

    Args:
        source: what `open_gates` takes.
        repository: Hub id; made if there is none of that name.
        private: make it private.
        revision: branch to write to, which is made if it is missing; None for `main`.
        message: of the commit.
        evaluation: folder of an evaluation of these gates; None for that of the run, if there is one.
        base_model: Hub id of the model; None for the one that the model folder was converted from.

    Raises:
        InputError: nothing that can be pushed, an evaluation of other gates, or a repository that holds something else.
        LsgError: the Hub refused, or was not reached.
    """
    _check_name(repository)
    if base_model is not None:
        _check_name(base_model)
    if repository.endswith(".safetensors"):
        raise InputError(f"{repository}: not a Hub id that --gates takes: what ends in .safetensors is a file")
    files = gate_files(source, repository, revision=revision, evaluation=evaluation, base_model=base_model)
    return _upload(files, repository, private=private, revision=revision, message=message or MESSAGE)


def _check_name(name: str) -> None:
    """Raises InputError for what is no Hub id."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not re.fullmatch(REPOSITORY, name):
        raise InputError(f"{name}: not a Hub id; write it as owner/name")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{name}: not a Hub id: {first_line(error)}") from None


def gate_files(
    source: str | Path,
    repository: str,
    *,
    revision: str | None = None,
    evaluation: Path | None = None,
    base_model: str | None = None,
) -> dict[str, bytes]:
    """The files of a repository by name. Arguments and errors as of `push_gates`."""
    gates = open_gates(source)
    data = gate_bytes(gates, where=str(source))
    digest = tree_sha256(gates.parameters)
    local = None if on_hub(source) is not None else split_layers(source)[0]
    run = local if local is not None and (local / RUN).is_file() else None
    shared = Shared(
        repository=repository,
        revision=revision,
        gates=gates,
        digest=digest,
        file=data,
        made=made_by(run, base_model=base_model),
        scores=find_scores(run, evaluation, gates, digest),
    )
    sinks = "\n".join(["# What counts as a sink for these gates.", *toml_lines({"sinks": to_dict(gates.sinks)})])
    return {GATE_FILE: data, SINKS: f"{sinks}\n".encode(), CARD: model_card(shared).encode()}


def _upload(files: dict[str, bytes], repository: str, *, private: bool, revision: str | None, message: str) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi(library_name="lsg_jax")
    try:
        _make_ready(api, repository, private=private, revision=revision)
        # `upload_folder` may split what it uploads into several commits
        done = api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()],
            commit_message=message,
            revision=revision,
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: of the upload of a large file
        raise LsgError(_refusal(repository, error)) from None
    return Pushed(repository, done.oid, str(done.commit_url))


def _make_ready(api: Any, repository: str, *, private: bool, revision: str | None) -> None:
    """Makes the repository and the branch if they are missing, and checks that nothing else is overwritten."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"https://huggingface.co/{repository}"
    try:
        held = api.model_info(repository)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private or None, exist_ok=True)
        held = None
    if held is not None and private and held.private is False:
        advice = f"make it private at {page}/settings, or choose another name"
        raise InputError(f"{repository}: is public already, and --private is for new repositories; {advice}")
    if revision is not None:
        try:
            held = api.model_info(repository, revision=revision)
        except RevisionNotFoundError:
            api.create_branch(repository, branch=revision)
            return  # its first commit is that of `main`, which stays as it is
    names = {each.rfilename for each in (held.siblings or [] if held is not None else [])}
    if CARD in names and GATE_FILE not in names:
        where = repository if revision is None else f"{repository}@{revision}"
        raise InputError(f"{where}: holds a {CARD} and no {GATE_FILE}: it is of something else; choose another repository")


def _refusal(repository: str, error: Exception) -> str:
    """What went wrong when something was written to the Hub and what to do, in one line."""
    http, status = answer_of(error)
    where = f"{repository}: the Hugging Face Hub answered {status}"
    if status == 401:
        return f"{where}: there is no token, or an invalid one; run `hf auth login` with a token that may write"
    if status == 403:
        return f"{where}: your token may not write there; run `hf auth login` with one that may, or choose a name of your own"
    if status == 404:
        return f"{where}: no such owner, or nothing that your token may see; check the name"
    if status in (409, 412):
        return f"{where}: something else writes to it at the same time; run it again"
    if (later := not_now(http)) is not None:
        return f"{where}: {later}"
    return f"{repository}: could not be written to the Hugging Face Hub: {unanswered(error)}"
