"""One request: its state, its speech on the way to the client, the host RAM of that, and how it ended.

A request knows no queue, engine or model; see `scheduling` for these. Outsiders import from this package only.
"""

from gpu_worker.requests.audio_buffer import AudioBuffer as AudioBuffer
from gpu_worker.requests.audio_buffer import may_grow as may_grow
from gpu_worker.requests.audio_buffer import may_park as may_park
from gpu_worker.requests.outcomes import MAX_OUTCOMES as MAX_OUTCOMES
from gpu_worker.requests.outcomes import Outcomes as Outcomes
from gpu_worker.requests.request import BYTES_PER_S as BYTES_PER_S
from gpu_worker.requests.request import MIN_SLICE_S as MIN_SLICE_S
from gpu_worker.requests.request import STALLED_AFTER_S as STALLED_AFTER_S
from gpu_worker.requests.request import Cancelled as Cancelled
from gpu_worker.requests.request import Ending as Ending
from gpu_worker.requests.request import Outcome as Outcome
from gpu_worker.requests.request import Request as Request
from gpu_worker.requests.request import RequestState as RequestState
from gpu_worker.requests.sink import Send as Send
from gpu_worker.requests.sink import Sink as Sink
from gpu_worker.requests.sink import failed_message as failed_message
from gpu_worker.requests.sink import speech_error as speech_error
