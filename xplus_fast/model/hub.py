"""What is had from the Hugging Face hub, and one line for whatever its client raises.

The client of huggingface_hub changes from release to release (requests, httpx, httpx2): nothing of
it is imported here. Its errors are known by those of the hub, which derive from them.
"""

import glob
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xplus_fast.errors import UserError
from xplus_fast.files import resolve

# What a model needs; never code, never pickles.
WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer*"]


def model_from_hub(name: str) -> Path:
    """The folder into which a model is downloaded, or was before. Raises `UserError`."""
    return _had(name, lambda hub: hub.snapshot_download(name, allow_patterns=WANTED))


def config_from_hub(name: str) -> Path:
    """A model's config.json alone. Raises `UserError`."""

    def download(hub: Any) -> str:
        cached = hub.try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return cached
        if not hub.constants.HF_HUB_OFFLINE:
            _reach(hub.constants.ENDPOINT)
        return hub.hf_hub_download(name, "config.json")

    return _had(name, download)


def data_from_hub(name: str, choose: Callable[[Sequence[str], str], Sequence[str]]) -> Path:
    """The folder into which files of a data set are downloaded, or were before.

    choose: the names of all its files, and the text of its card -> the names of those wanted.
    Where the hub is not asked or not reached, all that lies in its cache is given. Raises
    `UserError`, and what `choose` raises.
    """

    def download(hub: Any) -> str:
        def have(wanted: Sequence[str], local: bool) -> str:
            # the card of all, lest newer clients find the snapshot incomplete without the rest
            patterns = [*map(glob.escape, wanted), "README.md"]
            return hub.snapshot_download(
                name, repo_type="dataset", allow_patterns=patterns, local_files_only=local
            )

        if hub.constants.HF_HUB_OFFLINE:
            return have([], local=True)
        try:
            _reach(hub.constants.ENDPOINT)
            names = [file.rfilename for file in hub.HfApi().dataset_info(name).siblings]
        except hub.errors.HfHubHTTPError:  # the hub's answer
            raise
        except _clients(hub.errors):
            return have([], local=True)
        card = ""
        if "README.md" in names:
            path = hub.hf_hub_download(name, "README.md", repo_type="dataset")
            card = Path(path).read_text(encoding="utf-8", errors="replace")
        return have(choose(names, card), local=False)

    return _had(name, download)


def is_hub_id(name: str) -> bool:
    """Whether "org/name" is one, not a path: neither starts like one nor has its first half here.

    Raises `UserError` for what no path can be.
    """
    known = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII)
    return bool(known) and not resolve(name).parent.is_dir()


def on_hub(name: str, file: str) -> Path:
    """See that a file of a repository is in the hub's cache, or may be downloaded. Raises
    `UserError`."""

    def ask(hub: Any) -> str:
        cached = hub.try_to_load_from_cache(name, file)
        if isinstance(cached, str):
            return cached
        if hub.constants.HF_HUB_OFFLINE:
            raise hub.errors.OfflineModeIsEnabled(name)
        _reach(hub.constants.ENDPOINT)
        hub.get_hf_file_metadata(hub.hf_hub_url(name, file), timeout=10)
        return file

    return _had(name, ask)


def _had(name: str, download: Callable[[Any], str]) -> Path:
    if not is_hub_id(name):
        raise UserError(f"{name}: no such model folder")
    import huggingface_hub.constants
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it would tell of each of its retries
    own = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    others = (*own, *_clients(errors))
    try:
        return Path(download(huggingface_hub))
    except errors.GatedRepoError:
        why = "gated: accept its terms on huggingface.co, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "no such folder here, and no such repository on the hub (or a private one)"
    except errors.HFValidationError:
        why = "no such folder here, and not a hub id (org/name)"
    except errors.OfflineModeIsEnabled:
        why = "no such folder here, nor in the hub's cache, and the hub may not be asked (offline)"
    except (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError, socket.gaierror):
        why = "no such folder here, nor in the hub's cache, and the hub cannot be reached"
    except errors.EntryNotFoundError as e:
        why = f"its repository has not what is wanted: {_line(e)}"
    except others as e:
        why = f"cannot be downloaded from the hub: {_line(e)}"
    raise UserError(f"{name}: {why}")


def _clients(errors: Any) -> tuple[type[Exception], ...]:
    """What the client that the hub's stands on raises, and sockets."""
    return OSError, *errors.HfHubHTTPError.__mro__[1:-3]  # up to Exception, BaseException, object


def _reach(url: str) -> None:
    """Raise OSError where a server does not answer: the hub's client tries for half a minute."""
    parts = urllib.parse.urlsplit(url)
    if not urllib.request.getproxies() and parts.hostname:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname, port), timeout=5).close()


def _line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200]
