"""The hub: ``OWNER/NAME[@REVISION]`` → a folder in the local cache, and files → a repository.

huggingface_hub does the communication: login, cache, offline mode (HF_HUB_OFFLINE). It is imported only when
needed. Only ``config.json`` and safetensors are downloaded: no pickle, no code.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from far.card import may_replace
from far.errors import InputError

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?", re.ASCII)
_AUTOENCODER_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)(?:@(.+))?", re.ASCII)
# Weights in one file or in several. A variant such as fp16 is not downloaded.
_AUTOENCODER_FILES = (
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)


def is_hub_name(name: str) -> bool:
    """Return whether a name has the form ``OWNER/NAME`` or ``OWNER/NAME@REVISION``."""
    return _NAME.fullmatch(name) is not None


def is_autoencoder_name(name: str) -> bool:
    """Return whether a name has the form ``OWNER/NAME[/SUBFOLDER][@REVISION]``."""
    return _AUTOENCODER_NAME.fullmatch(name) is not None


def download(name: str, revision: str | None = None, *, local_files_only: bool = False) -> Path:
    """Return the folder in the local cache with a repository's files; missing ones are downloaded.

    Args:
        name: ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.
        revision: a branch, tag or commit; ``None`` is the one in the name, else the main branch.
        local_files_only: use the cache alone, without any request, as HF_HUB_OFFLINE=1 does.

    Raises:
        InputError: the repository or revision is missing, private, unreachable or not a model of far.
    """
    repository, revision = _split(name, revision)
    # Files in the top folder only: ours are never deeper.
    patterns, local = ["config.json", "*.safetensors"], local_files_only
    folder = _snapshot(repository, revision, patterns, ignored=["*/*"], local_files_only=local)
    if not ((folder / "config.json").is_file() and any(folder.glob("*.safetensors"))):
        remedy = "Download MAR's checkpoints and run far convert mar and far convert kl16"
        raise InputError(f"{repository} on the hub does not hold config.json and safetensors. {remedy}")
    return folder


def download_autoencoder(name: str, *, local_files_only: bool = False) -> tuple[Path, str]:
    """Return the local folder of an autoencoder of diffusers, and its name with the commit as revision.

    Args:
        name: ``OWNER/NAME[/SUBFOLDER][@REVISION]``, such as a pipeline's subfolder ``vae``.
        local_files_only: as for :func:`download`.

    Raises:
        InputError: the repository or revision is missing, private or unreachable, or holds no
            ``config.json`` there.
    """
    match = _AUTOENCODER_NAME.fullmatch(name)
    assert match is not None, name
    repository, subfolder, revision = match[1], match[2].removeprefix("/"), match[3]
    patterns = [f"{subfolder}/{file}" if subfolder else file for file in _AUTOENCODER_FILES]
    snapshot = _snapshot(repository, revision, patterns, ignored=[], local_files_only=local_files_only)
    if not (snapshot / subfolder / "config.json").is_file():
        raise InputError(f"{name} holds no config.json. Name the subfolder, such as {repository}/vae")
    return snapshot / subfolder, f"{repository}{match[2]}@{snapshot.name}"


def _snapshot(
    repository: str, revision: str | None, patterns: list[str], *, ignored: list[str], local_files_only: bool
) -> Path:
    """Download the files of some names, and return their folder, which is named by the commit."""
    from huggingface_hub import snapshot_download

    with _refusals_in_one_line(repository, revision):
        folder = snapshot_download(
            repository, revision=revision, local_files_only=local_files_only,
            allow_patterns=patterns, ignore_patterns=ignored,
        )  # fmt: skip
    return Path(folder)


def upload(
    files: Mapping[str, Path],
    card: str,
    name: str,
    revision: str | None = None,
    *,
    other_form: str,
    private: bool | None = None,
    message: str,
    token: str | None = None,
) -> str:
    """Publish files and a model card in one commit, and return the repository's address.

    The repository's ``README.md`` stays if somebody wrote it (:func:`far.card.may_replace`). The other
    parameters are those of :meth:`far.Pipeline.push_to_hub`; ``message`` is its ``commit_message``.

    Args:
        files: the files by the paths under which they are published.
        card: the text of ``README.md``.
        other_form: the file that shows that a repository holds a model for another library. It is refused,
            because the files of both would be mixed.

    Raises:
        InputError: the name is not valid, nobody is logged in, writing there is not allowed, the repository
            holds ``other_form``, the hub cannot be reached, or it refuses the card (such as its license).
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if not is_hub_name(name):
        raise InputError(f"{name!r} is not a name on the hub. Give OWNER/NAME, or OWNER/NAME@BRANCH")
    repository, revision = _split(name, revision)
    api = HfApi(token=token)
    with _refusals_in_one_line(repository, revision):
        address = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:  # an existing repository stays as it is
            raise InputError(f"{repository} is public already. Make it private on the hub, or name another")
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        if other_form in api.list_repo_files(repository, revision=revision):
            raise InputError(
                f"{name} holds {other_form}, of a model for another library. Give another repository (a new"
                " branch has the files of main), or delete the files of that model there first"
            )
        try:
            # An empty cache: if the hub did not answer, the usual one would supply an older card.
            with tempfile.TemporaryDirectory() as cache:
                path = api.hf_hub_download(repository, "README.md", revision=revision, cache_dir=cache)
                published = Path(path).read_text(encoding="utf-8", errors="replace")
        except RemoteEntryNotFoundError:  # the hub answers that it has none; no answer raises another error
            published = ""
        operations = [CommitOperationAdd(path, file) for path, file in files.items()]
        if may_replace(published):
            operations.append(CommitOperationAdd("README.md", card.encode()))
        api.create_commit(repository, operations, commit_message=message, revision=revision)
    return str(address)


def _split(name: str, revision: str | None) -> tuple[str, str | None]:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    if revision is not None and match[2] is not None:
        raise InputError(f"{name!r} names a revision, and revision {revision!r} is given too. Leave one out")
    return match[1], revision or match[2]


@contextlib.contextmanager
def _refusals_in_one_line(repository: str, revision: str | None) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into an :class:`InputError`."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # hf_xet raises plain RuntimeErrors
        name = repr(repository) if revision is None else f"{repository!r} at revision {revision!r}"
        raise InputError(f"{name}: {_reason(error, repository)}") from error


def _reason(error: Exception, repository: str) -> str:
    """Return the reason of a failure and the remedy."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        address = f"{constants.ENDPOINT}/{repository}"
        return f"the model is gated. Accept its terms at {address} and log in with: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "not a model that you may see. Check the name, or log in with: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no such revision. Give a branch, tag or commit"
    if isinstance(error, errors.OfflineModeIsEnabled):  # a download reports what the cache lacks
        return "offline mode is on. Unset HF_HUB_OFFLINE to publish"
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = error.__cause__
        if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
            remedy = "offline mode is on. Load it once without local_files_only and HF_HUB_OFFLINE"
        else:
            remedy = f"the hub does not answer ({_line(cause)}). Check the name and the connection"
        return f"its copy in the cache is not complete, and {remedy}"
    if isinstance(error, errors.HfHubHTTPError):
        refused = error.response.status_code in (401, 403)
        remedy = "Log in with: hf auth login" if refused else "Check the name, or try again later"
        return f"the hub answers {_line(error)!r}. {remedy}"
    if isinstance(error, errors.HFValidationError):
        return f"not a valid name on the hub: {_line(error)}"
    if isinstance(error, (errors.HTTPError, OSError, RuntimeError)):
        return f"{_line(error)}. Check the connection, and the free space of the cache"
    return f"the hub refuses the model card: {_line(error)}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
