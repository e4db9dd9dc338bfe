"""Downloads adapters and ladders from the Hugging Face hub, unless they are in its cache on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chunkwise_lora.errors import LadderError, first_line, shown
from chunkwise_lora.ladder.adapter_location import MLX_WEIGHTS_NAME
from chunkwise_lora.ladder.folder import LADDER_NAME, LEARNED_NAME
from chunkwise_lora.ladder.peft_files import CONFIG_NAME, WEIGHTS_NAME


def adapter_on_hub(name: str, revision: str | None, subfolder: str | None) -> tuple[Path, Path]:
    """Return the paths of the config and of the weights of the adapter in a repository.

    Raises:
        LadderError: The hub does not have the adapter, does not give it to this user, or cannot be reached.
    """
    repository = _Repository(name, revision, subfolder)
    return repository.needed(CONFIG_NAME), repository.needed(WEIGHTS_NAME, MLX_WEIGHTS_NAME)


def ladder_on_hub(name: str, revision: str | None, subfolder: str | None) -> Path | None:
    """Return the folder of the ladder in a repository, or None if the repository holds none.

    Raises:
        LadderError: The hub does not have the repository, or does not give it to this user.
    """
    repository = _Repository(name, revision, subfolder)
    manifest = repository.find(LADDER_NAME)
    if manifest is None:
        return None
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        repository.needed(file)
    repository.find(LEARNED_NAME)
    return manifest.parent


@dataclass(frozen=True)
class _Repository:
    """A folder of a repository on the hub."""

    name: str
    revision: str | None
    subfolder: str | None

    def needed(self, *files: str) -> Path:
        """Return the path of the first of these files that the repository has.

        Raises:
            LadderError: It has none of them.
        """
        for file in files:
            if path := self.find(file):
                return path
        if path := self._download(files[0]):
            return path
        inside = f" in {shown(self.subfolder)}" if self.subfolder else ""
        raise LadderError(
            f"{self.name}: the repository on the hub has no {files[0]}{inside}; give one with a PEFT adapter, and its "
            "subfolder if it has one. Pickled weights (.bin) are not read, because they can run code when loaded"
        )

    def find(self, file: str) -> Path | None:
        """Return the path of a file, or None if the repository does not have it or the hub cannot be reached."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        return self._download(file, unless=(LocalEntryNotFoundError,))

    def _download(self, file: str, unless: Sequence[type[Exception]] = ()) -> Path | None:
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(hf_hub_download(self.name, file, revision=self.revision, subfolder=self.subfolder))
        except tuple(unless):
            return None
        except errors.GatedRepoError:
            why = "the hub gives it only to some users; request access on its page, and log in with `hf auth login`"
        except errors.RepositoryNotFoundError:
            why = "there is no such folder, and no such public repository on the hub; correct the name, or log in"
        except errors.RevisionNotFoundError:
            why = f"the repository on the hub has no revision {shown(self.revision)}; correct it"
        except errors.LocalEntryNotFoundError:
            why = (
                f"there is no such folder, {file} is not in the hub's cache on this machine, and the hub cannot be "
                "reached (or HF_HUB_OFFLINE is set); correct the path, or go online"
            )
        except errors.EntryNotFoundError:
            return None
        except errors.HFValidationError:
            why = "there is no such folder, and this cannot be the name of a repository on the hub; correct it"
        except Exception as error:  # a broken connection or a full disk can raise anything
            why = f"there is no such folder, and the hub answers with an error ({shown(first_line(error))})"
        raise LadderError(f"{shown(self.name)}: {why}")
