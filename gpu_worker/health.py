"""The probe of a running worker, for the health check of a container."""

import time
from typing import Any, Final

import zmq

from shared.protocol import VERSION, Failed, Hello, ProtocolError, Welcome, decode_from_worker, encode
from shared.sockets import connect_dealer

TIMEOUT_S: Final = 4.0


def check(url: str, token: str, timeout_s: float = TIMEOUT_S) -> str | None:
    """The problem of the worker at `url`; None if its synthesis loop answers a Hello within `timeout_s`."""
    context: zmq.Context[Any] = zmq.Context()
    dealer = connect_dealer(context, url)
    dealer.setsockopt(zmq.SNDTIMEO, int(timeout_s * 1000))
    deadline = time.monotonic() + timeout_s
    try:
        dealer.send_multipart(encode(Hello(version=VERSION, token=token)))
        while dealer.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            match decode_from_worker(dealer.recv_multipart()):
                case Welcome(), _:
                    return None
                case Failed(message=message), _:
                    return message
    except zmq.Again:
        return f"no worker listens at {url}"
    except ProtocolError as error:
        return str(error)
    finally:
        dealer.close()
        context.term()
    return f"no answer from {url} within {timeout_s:.0f} s"
