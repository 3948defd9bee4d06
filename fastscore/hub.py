"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations

import logging

logger = logging.getLogger("fastscore")

_SECONDS = 5.0


def hub_answers() -> bool:
    """Whether the hub answers at all, asked once and without retries.

    Its own client asks for every file of a model and tries each six times before it takes what it has on disk: minutes
    without a network. False, without asking, where ``HF_HUB_OFFLINE`` is set.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except OfflineModeIsEnabled:
        return False
    except Exception as error:  # noqa: BLE001  # of whichever HTTP library the client uses
        logger.warning("%s does not answer: what was fetched before is taken (%s)", constants.ENDPOINT, error)
        return False
    return True
