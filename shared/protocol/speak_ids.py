"""The id of a Speak, the request id that it is made of, and the names by which a client may know it."""

import uuid


def new_speak_id(request_id: str) -> str:
    """A new id for a Speak: the client's request id, which a client may use twice, a dot, and the speech id.

    The speech id is unguessable. The logs of both sides show the whole, so that either part finds the request there.
    """
    return f"{request_id}.{uuid.uuid4().hex}"


def speech_id_of(speak_id: str) -> str:
    """The speech id in the id of a Speak."""
    return speak_id.rpartition(".")[2]


def request_id_in(speak_id: str) -> str:
    """The client's request id in the id of a Speak."""
    return speak_id.rpartition(".")[0]


def is_known_as(speak_id: str, name: str) -> bool:
    """True if `name` is the request id or the speech id in `speak_id`."""
    request_id, _, speech_id = speak_id.rpartition(".")
    return name in (request_id, speech_id)
