"""The hub: ``OWNER/NAME[@REVISION]`` → a folder in the local cache, and a folder → a repository.

huggingface_hub does the talking: its login, its cache, its offline mode (HF_HUB_OFFLINE). It is imported where it is
used, since most work needs no hub. Nothing but ``config.json`` and safetensors is downloaded: no pickle, no code.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from far.card import may_replace
from far.errors import InputError

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?", re.ASCII)


def is_hub_name(name: str) -> bool:
    """Whether a name has the form ``OWNER/NAME`` or ``OWNER/NAME@REVISION``."""
    return _NAME.fullmatch(name) is not None


def download(name: str, revision: str | None = None, *, local_files_only: bool = False) -> Path:
    """The folder in the local cache that holds a repository's ``config.json`` and safetensors, downloaded where missing.

    Args:
        name: ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.
        revision: a branch, tag or commit; ``None`` is the one in the name, else the repository's main branch.
        local_files_only: take what the cache holds and ask nobody, as HF_HUB_OFFLINE=1 does.

    Raises:
        InputError: the repository or revision does not exist, is gated or private, cannot be reached and is not in the
            cache, or holds no model of far.
    """
    from huggingface_hub import snapshot_download

    repository, revision = _split(name, revision)
    with _refusals_in_one_line(repository, revision):
        # Of the top folder only: what lies deeper is not ours.
        folder = snapshot_download(
            repository, revision=revision, local_files_only=local_files_only,
            allow_patterns=["config.json", "*.safetensors"], ignore_patterns=["*/*"],
        )  # fmt: skip
    if not ((Path(folder) / "config.json").is_file() and any(Path(folder).glob("*.safetensors"))):
        raise InputError(
            f"{repository} on the hub holds no config.json with safetensors, as far writes them, and pickles (.bin, .pth, .ckpt) are "
            "not read from there; download MAR's checkpoints and convert them with far convert mar and far convert kl16"
        )
    return Path(folder)


def upload(
    folder: Path,
    name: str,
    revision: str | None = None,
    *,
    private: bool | None = None,
    message: str,
    token: str | None = None,
) -> str:
    """Publish the files of ``folder`` in one commit, in a repository that is made where missing, and return its address.

    The repository's ``README.md`` stays if somebody wrote it (:func:`far.card.may_replace`).

    Args:
        folder: what :meth:`far.Pipeline.save_pretrained` wrote.
        name: ``OWNER/NAME`` or ``OWNER/NAME@BRANCH``.
        revision: the branch, made where missing; ``None`` is the one in the name, else main.
        private: of a new repository; ``None`` is the owner's default, usually public.
        message: of the commit.
        token: instead of the one that huggingface_hub knows.

    Raises:
        InputError: the name is no ``OWNER/NAME``; nobody is logged in, or not one who may write there; the hub cannot be
            reached, or refuses the card (such as its licence).
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if not is_hub_name(name):
        raise InputError(f"{name!r} is no name on the hub; give OWNER/NAME, or OWNER/NAME@BRANCH")
    repository, revision = _split(name, revision)
    api = HfApi(token=token)
    with _refusals_in_one_line(repository, revision):
        address = api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        try:
            # Of a cache of its own: if the hub did not answer now, the usual one would stand in with an older card.
            with tempfile.TemporaryDirectory() as cache:
                path = api.hf_hub_download(repository, "README.md", revision=revision, cache_dir=cache)
                card = Path(path).read_text(encoding="utf-8", errors="replace")
        except RemoteEntryNotFoundError:  # the hub says that there is none; silence raises another one
            card = ""
        kept = [] if may_replace(card) else ["README.md"]
        api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, commit_message=message, ignore_patterns=kept
        )  # fmt: skip
    return str(address)


def _split(name: str, revision: str | None) -> tuple[str, str | None]:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    if revision is not None and match[2] is not None:
        raise InputError(f"{name!r} names a revision, and revision {revision!r} is given too; leave one out")
    return match[1], revision or match[2]


@contextlib.contextmanager
def _refusals_in_one_line(repository: str, revision: str | None) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into an :class:`InputError`."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        address = f"{constants.ENDPOINT}/{repository}"
        raise InputError(
            f"{repository} is gated; accept its terms at {address} and log in with: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{repository!r} is no folder here and no model on the hub that you may see; check the name, or log in with: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{repository} has no revision {revision!r} on the hub; give one of its branches, tags or commits"
        ) from error
    except (
        errors.OfflineModeIsEnabled
    ) as error:  # of publishing; where a download meets it, the cache is what counts
        raise InputError(f"{repository}: offline mode is on; unset HF_HUB_OFFLINE to publish") from error
    except errors.LocalEntryNotFoundError as error:
        reason = error.__cause__
        pinned = "" if revision is None else f" at revision {revision!r}"
        if reason is None or isinstance(reason, errors.OfflineModeIsEnabled):
            raise InputError(
                f"{repository!r}{pinned} is no folder here and not wholly in the hub's cache, and offline nothing else is asked; "
                "load it once without local_files_only and HF_HUB_OFFLINE"
            ) from error
        raise InputError(
            f"{repository!r}{pinned} is no folder here and not wholly in the hub's cache, and the hub does not answer "
            f"({_line(reason)}); check the name and the connection"
        ) from error
    except errors.HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403)
        remedy = (
            "log in with hf auth login as one who may do this"
            if refused
            else "check the name, or try again later"
        )
        raise InputError(f"{repository}: the hub answers {_line(error)!r}; {remedy}") from error
    except errors.HFValidationError as error:
        raise InputError(
            f"{repository!r} is no folder here and no possible name on the hub: {_line(error)}"
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise InputError(
            f"{repository}: {_line(error)}; check the connection, and the space in the cache's folder"
        ) from error
    except ValueError as error:  # a card that the hub's check refuses
        raise InputError(f"{repository}: the hub refuses the model card: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
