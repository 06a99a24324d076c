"""The Hugging Face Hub: one safetensors file, and a model card that says first how good it is.

Only the file of one name is ever fetched, and its own strict parser reads it, so that opening a stranger's repository
cannot run code. The methods have the names and arguments of ``huggingface_hub.ModelHubMixin``, which is not used: it
keeps a second copy of the settings in a ``config.json``, wraps ``__new__``, and its import would cost everybody who
loads a generator 0.15 to 0.2 s. ``huggingface_hub`` is imported on first use here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol, TypeVar

from pdiff_plugin._version import __version__
from pdiff_plugin.errors import HubError

H = TypeVar("H", bound="HubMixin")

_CARD_NAME = "README.md"
_COMMIT_MESSAGE = "Push with pdiff-plugin"
_TAGS = ("pdiff", "neural-network-diffusion")
_NOT_EVALUATED = (
    "Not evaluated: nothing is known of how good these weights are. Judge them beside what the same snapshots give for "
    "nothing with `pdiff evaluate` before you rely on them."
)


class Judged(Protocol):
    """What a card tells of an evaluation; :class:`pdiff_plugin.Evaluation` and ``ConditionEvaluation`` are such."""

    @property
    def sentence(self) -> str:
        """The verdict."""

    @property
    def details(self) -> Mapping[str, Any]:
        """What was judged."""

    def table_text(self) -> str:
        """The table and all that belongs to it, as plain text."""


@dataclass(frozen=True)
class About:
    """What a card tells of the object itself.

    Attributes:
        text: what it is, one paragraph.
        loading: code that loads and uses it; the reader has a ``model``.
        tags: further tags of the repository.
    """

    text: str
    loading: str
    tags: tuple[str, ...] = ()


class HubMixin:
    """``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` of a class that keeps itself in one file."""

    hub_file: ClassVar[str]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        evaluation: Judged | None = None,
        base_model: str | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the file and a model card into a folder; a ``README.md`` that is there stays.

        Args:
            save_directory: the folder, made if missing.
            repo_id: what the card calls it, and where ``push_to_hub`` puts it; the name of the folder unless given.
            push_to_hub: also push it.
            evaluation: what :func:`pdiff_plugin.evaluate` found of it; without it the card says "not evaluated".
            base_model: the model whose weights these are, as the Hub names it.
            **push_to_hub_kwargs: further arguments of :meth:`push_to_hub`.

        Returns:
            The address of the commit if it was pushed.
        """
        repo_id = repo_id or Path(save_directory).name
        self._write(Path(save_directory), self._card(repo_id, None, evaluation, base_model))
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id, evaluation=evaluation, base_model=base_model, **push_to_hub_kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = _COMMIT_MESSAGE,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        evaluation: Judged | None = None,
        base_model: str | None = None,
    ) -> str:
        """Upload the file and its model card to a repository, which is made if missing; returns the commit's address.

        Args:
            repo_id: ``user/name``.
            commit_message: of the one commit.
            private: of a repository that is made; the account's default unless given.
            token: of the account; the one of ``hf auth login`` or ``HF_TOKEN`` unless given.
            branch: to push to, made if missing; ``main`` unless given.
            create_pr: open a pull request with it instead.
            evaluation: what :func:`pdiff_plugin.evaluate` found of it; without it the card says "not evaluated".
            base_model: the model whose weights these are, as the Hub names it.

        Raises:
            HubError: the Hub refuses us, or does not answer.
        """
        with TemporaryDirectory() as folder:
            self._write(Path(folder), self._card(repo_id, None if create_pr else branch, evaluation, base_model))
            with _hub_errors(repo_id):
                from huggingface_hub import HfApi

                api = HfApi(token=token, library_name="pdiff-plugin", library_version=__version__)
                made = api.create_repo(repo_id, private=private, exist_ok=True)
                if branch is not None and not create_pr:
                    api.create_branch(made.repo_id, branch=branch, exist_ok=True)
                done = api.upload_folder(
                    repo_id=made.repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=branch,
                    create_pr=create_pr,
                )
                return str(done.pr_url or done.commit_url)

    @classmethod
    def from_pretrained(
        cls: type[H],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> H:
        """Load from the Hub, or from a folder that :meth:`save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: ``user/name``, or a folder.
            force_download: fetch it even if it is in the cache.
            token: of the account; the one of ``hf auth login`` or ``HF_TOKEN`` unless given.
            cache_dir: huggingface_hub's own cache unless given.
            local_files_only: take what is in the cache and ask nobody, as with ``HF_HUB_OFFLINE=1``.
            revision: branch, tag or commit; ``main`` unless given.
            **model_kwargs: further arguments of ``load``.

        Raises:
            HubError: no such repository, revision or file, or no answer.
            FormatError, FormatVersionError: the file there is something else.
        """
        path = Path(pretrained_model_name_or_path)
        if path.is_dir():
            return cls._load_shared(path / cls.hub_file, **model_kwargs)
        path = downloaded(
            str(pretrained_model_name_or_path),
            cls.hub_file,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        return cls._load_shared(path, **model_kwargs)

    def _write(self, folder: Path, card: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._save_for_others(folder / self.hub_file)
        if not (folder / _CARD_NAME).exists():
            (folder / _CARD_NAME).write_text(card, encoding="utf-8")

    @classmethod
    def _load_shared(cls: type[H], path: Path, **options: Any) -> H:
        raise NotImplementedError

    def _save_for_others(self, path: Path) -> None:
        raise NotImplementedError

    def _about(self, source: str, evaluation: Judged | None) -> About:
        """What to tell of it; ``source`` are the first arguments of ``from_pretrained``, as code.

        Raises:
            ConfigError: the evaluation is of another one.
        """
        raise NotImplementedError

    def _card(self, repo_id: str, revision: str | None, evaluation: Judged | None, base_model: str | None) -> str:
        """The text of the model card: the verdict, what it is, how to load it, and the table."""
        source = f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")
        about = self._about(source, evaluation)
        header: dict[str, Any] = {"library_name": "pdiff-plugin", "tags": [*_TAGS, *about.tags]}
        if base_model is not None:
            header["base_model"] = base_model
        weights_of = f"`{base_model}`" if base_model else "a model that the author of this page did not name"
        parts = [
            f"# {repo_id}",
            f"**{_NOT_EVALUATED if evaluation is None else evaluation.sentence}**",
            f"{about.text} The weights are those of {weights_of}.",
            "## Load it\n\n"
            f"```python\n{about.loading}\n```\n\n"
            "`pip install pdiff-plugin`; the file is safetensors, and loading it runs no code of anybody.",
        ]
        if evaluation is not None:
            parts.append(f"## How it was judged\n\n```text\n{evaluation.table_text()}\n```")
        parts.append(f"Written by pdiff-plugin {__version__}.")
        from huggingface_hub import ModelCardData

        return f"---\n{ModelCardData(**header).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def downloaded(repo_id: str, name: str, **options: Any) -> Path:
    """The one file of a repository on the Hub, in the cache of huggingface_hub; ``options`` as there.

    Raises:
        HubError: no such repository, revision or file, or no answer.
    """
    with _hub_errors(repo_id):
        from huggingface_hub import HfApi

        api = HfApi(library_name="pdiff-plugin", library_version=__version__)
        return Path(api.hf_hub_download(repo_id, name, **options))


def hub_address(text: str) -> tuple[str, str | None] | None:
    """Repository and revision of ``hf://user/name[@revision]``, also as a path, which has lost a slash; else None."""
    found = re.fullmatch(r"hf:/{1,2}([^/@]+/[^/@]+)(?:@(.+))?", text)
    return (found[1], found[2]) if found else None


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Raise :class:`HubError` for whatever goes wrong on the way to the Hub inside."""
    from huggingface_hub.errors import HfHubHTTPError

    # Among its bases is that of the HTTP library, whichever it is: a refused connection is another kind of it. Names
    # and cards that the Hub does not take are ValueErrors, a storage that does not answer is a RuntimeError.
    expected: tuple[type[BaseException], ...] = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)
    try:
        yield
    except expected as error:
        told = f"{error} ({error.__cause__})" if isinstance(error, RuntimeError) and error.__cause__ else str(error)
        raise HubError(repo_id, " ".join(told.split())) from error
