"""Download from the Hugging Face Hub, and fail with one message, soon, where it cannot be reached."""

import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from open_clip import pretrained as open_clip_pretrained

from toolchain.errors import ArtifactError, one_line
from toolchain.recipe.model_names import HUB

_ANSWER_S = 5.0  # in which the Hub answers one small request, or counts as unreachable


def from_hub(repository: str, filename: str | None, say: Callable[[str], None]) -> Path:
    """Return a file of a repository, its weights if `filename` is None; `say` receives a message before.

    Raises:
        ArtifactError: it is neither in the Hub's local cache nor can it be downloaded.
    """
    what = f"{HUB}{repository}, {filename or 'its weights'}"
    say(f"{what}: loading from the Hugging Face Hub or its local cache")
    unreachable = offline_reason()
    try:
        return Path(open_clip_pretrained.download_pretrained_from_hf(repository, filename=filename))
    except Exception as error:  # the Hub's client raises all kinds
        raise not_downloaded(what, unreachable or error) from error


def download_tag(what: str, tag: dict[str, Any], say: Callable[[str], None]) -> Path:
    """Return the weights file of one of open_clip's tags.

    Raises:
        ArtifactError: as `from_hub`.
    """
    say(f"{what}: loading from {tag.get('hf_hub') or tag.get('url')} or its local cache")
    unreachable = offline_reason() if tag.get("hf_hub") else None
    try:
        return Path(open_clip_pretrained.download_pretrained(tag))
    except Exception as error:  # the Hub's client, urllib and open_clip raise all kinds
        raise not_downloaded(what, unreachable or error) from error


@cache
def offline_reason() -> str | None:
    """Return why the Hub cannot be reached, or None if it answers; ask once per process, for a few seconds at most.

    If it does not answer, the Hub's client is told to read its local cache only.  It would otherwise repeat every
    request five times, with two warnings each, before it does so by itself.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE), and the file is not in the local cache"
    failed: list[str] = []
    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_ANSWER_S)
        except Exception as error:  # the client and its HTTP library raise all kinds
            failed.append(one_line(error))
        answered.set()

    threading.Thread(target=ask, daemon=True).start()  # a name server that is silent would hold this thread up
    if answered.wait(_ANSWER_S + 1) and not failed:
        return None
    constants.HF_HUB_OFFLINE = True
    reason = failed[0] if failed else f"no answer within {_ANSWER_S:g} s"
    return f"{constants.ENDPOINT} cannot be reached: {reason}; and the file is not in the local cache"


def not_downloaded(what: str, reason: Exception | str) -> ArtifactError:
    """Return the error for a download that failed."""
    told = reason if isinstance(reason, str) else one_line(reason)
    return ArtifactError(
        f"{what}: cannot be downloaded ({told}). Check the name and the network. Offline, copy the cache "
        "(HF_HOME) of a machine that has downloaded it, or name a folder, or a file with checkpoint"
    )
