"""The settings: TTS_* variables become one frozen Struct; all mistakes are reported together.

A field's annotation has its limits; its variable is TTS_ and the field's name without the suffix of a unit.
`Live` and `WorkerLive` mark the settings that a running service takes anew (see settings_reload.py).
The web side and the GPU worker read the same variables, so one file configures both. .env.example explains each.
"""

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from shared.sockets import AddressError, ipc_path
from shared.text import MAX_INPUT_CHARS
from shared.validation_messages import choices_in, one_of, reword

PREFIX: Final = "TTS_"

EVERY_MODEL: Final = "*"
"""The key of the value that is for all models, in settings that may have a value for each."""

T = TypeVar("T")
LIVE: Final = "live"
WORKER_LIVE: Final = "worker-live"

Live = Annotated[T, LIVE]
"""A setting of the web side that a reload takes; one that is not marked needs a restart."""

WorkerLive = Annotated[T, LIVE, WORKER_LIVE]
"""A setting that a reload takes in the GPU worker too."""

Seconds = Annotated[float, Meta(gt=0, le=31_536_000)]
Megabytes = Annotated[int, Meta(ge=1, le=100_000_000)]
MAX_REPLICAS: Final = 10_000


class ReplicaBounds(NamedTuple):
    """On how many replicas of a cluster a model is: on the minimum in any case, on more while a queue justifies it."""

    minimum: int = 1
    maximum: int = MAX_REPLICAS

    def __str__(self) -> str:
        return f"{self.minimum}:{self.maximum}"


class SettingsError(Exception):
    """One or more settings are wrong; the message names each of them."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("wrong settings:\n" + "\n".join(f"  {problem}" for problem in problems))
        self.problems = problems


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings. `public` leaves the secrets among them out."""

    # the web side
    host: Annotated[str, Meta(min_length=1, max_length=255)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65_535)] = 8000
    web_workers: Annotated[int, Meta(ge=1, le=64)] = 1
    tls_cert: Path | None = None
    tls_key: Path | None = None
    worker_url: str | None = None
    worker_token: Annotated[str, Meta(max_length=256)] = ""
    worker_timeout_s: Annotated[float, Meta(ge=2, le=31_536_000)] = 30.0
    api_title: Annotated[str, Meta(min_length=1, max_length=100)] = "Qwen3-TTS server"
    api_keys: Live[list[str]] = []
    admin_keys: Live[list[str]] = []
    keys_file: Live[Path | None] = None
    cors_origins: Live[list[str]] = []
    allowed_hosts: Live[list[str]] = []
    trusted_proxies: Live[list[str]] = msgspec.field(default_factory=lambda: ["127.0.0.0/8", "::1"])
    root_path: Live[str] = ""
    web_page: bool = True
    max_connections: Annotated[int, Meta(ge=64, le=1_000_000)] = 4096
    max_connections_per_address: Live[Annotated[int, Meta(ge=1, le=1_000_000)]] = 256
    max_input_chars: WorkerLive[Annotated[int, Meta(ge=1, le=MAX_INPUT_CHARS)]] = 4096
    body_buffer_mb: Live[Annotated[int, Meta(ge=16, le=1_000_000)]] = 256
    max_body_mb: Annotated[int, Meta(ge=1, le=256)] = 16
    allow_ref_urls: Live[bool] = False
    input_format: Live[Literal["auto", "text", "markdown", "ssml"]] = "auto"
    pronunciations: Live[Path | None] = None
    model_aliases: Live[dict[str, str]] = {}
    require_consent: Live[bool] = False
    unknown_voice: Live[Literal["refuse", "default"]] = "refuse"
    provenance: Live[bool] = True
    audio_store_dir: Path = Path("models/audio")
    audio_store_mb: Live[Annotated[int, Meta(ge=0, le=100_000_000)]] = 256
    audio_store_ttl_s: Live[Seconds] = 3600.0

    # a cluster
    replicas: Annotated[int, Meta(ge=1, le=MAX_REPLICAS)] | None = None
    min_replicas: Annotated[int, Meta(ge=0, le=MAX_REPLICAS)] | None = None
    scale_down_delay_s: Seconds = 300.0
    model_replicas: dict[str, ReplicaBounds] = {}

    # requests in the GPU worker
    max_concurrency: Annotated[int, Meta(ge=1, le=1024)] | None = None
    max_queue: WorkerLive[Annotated[int, Meta(ge=1, le=100_000)]] = 64
    audio_buffer_mb: WorkerLive[Annotated[int, Meta(ge=16, le=100_000_000)]] = 512
    stall_timeout_s: WorkerLive[Seconds] = 300.0
    open_text_timeout_s: WorkerLive[Seconds] = 30.0
    drain_timeout_s: Seconds = 30.0
    usage_file: Path = Path("models/usage.sqlite")
    usage_days: Annotated[int, Meta(ge=0, le=36_500)] = 400

    # models
    default_device: Literal["auto", "cuda", "cpu"] = "auto"
    default_model: Annotated[str, Meta(min_length=1, max_length=200)] = "auto"
    default_model_size: Literal["large", "small"] = "large"
    attention_backend: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    kernels: Literal["auto", "torch", "triton"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    codec_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: dict[str, Literal["auto", "none", "fp16", "int8", "fp8"]] = msgspec.field(
        default_factory=lambda: {EVERY_MODEL: "auto"}
    )
    cpu_threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    models_dir: Path = Path("models")
    model_paths: dict[str, Path] = {}
    allow_download: bool = False
    voices_dir: Path = Path("models/voices")
    audit_log: Path | None = None
    audit_key_file: Path | None = None
    max_voices: Annotated[int, Meta(ge=0, le=100_000)] = 1000
    reference_cache_mb: Megabytes = 256
    sentence_pause_ms: Annotated[int, Meta(ge=0, le=5_000)] = 150

    # residency
    preload: list[str] = []
    idle_timeout_s: WorkerLive[Seconds] = 300.0
    host_idle_timeout_s: WorkerLive[Seconds] = 3600.0
    cleanup_interval_s: WorkerLive[Seconds] = 30.0
    cleanup_enabled: WorkerLive[bool] = True
    vram_budget_mb: WorkerLive[Megabytes | None] = None
    host_budget_mb: WorkerLive[Megabytes | None] = None

    # logging
    log_level: WorkerLive[Literal["debug", "info", "warning", "error"]] = "info"
    log_format: Literal["console", "json"] = "console"

    # traces
    otlp_endpoint: Annotated[str, Meta(max_length=2000)] = ""

    def public(self) -> dict[str, Any]:
        """The settings as plain JSON values, without keys and tokens."""
        values = msgspec.to_builtins(self, str_keys=True, enc_hook=str)
        shown = {name.removesuffix("_s"): value for name, value in values.items() if name not in SECRET}
        return shown | {"default_model_size": SIZE_NAMES[self.default_model_size]}

    def secrets(self) -> list[str]:
        """The keys and the token as they are."""
        return [*self.api_keys, *self.admin_keys, self.worker_token]

    def needing_cuda(self) -> list[str]:
        """The variables whose values need a CUDA device."""
        values = {"default_device": self.default_device == "cuda"}
        values["kernels"] = self.kernels == "triton" and self.default_device != "cpu"
        return [variable_of(name) for name, needs in values.items() if needs]

    def url(self, host: str) -> str:
        """The URL of the web side at `host`, a name or an IP address."""
        scheme = "https" if self.tls_cert else "http"
        return f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"

    def audit_path(self) -> Path:
        """The audit log of saved voices."""
        return self.audit_log or self.voices_dir / "audit.jsonl"

    def worker_public(self) -> dict[str, Any]:
        """The public settings that the GPU worker alone uses; its environment may differ from the web side's."""
        return {name: value for name, value in self.public().items() if name not in _USED_BY_WEB_SIDE}


_DEFAULTS: Final = Settings()

SIZE_NAMES: Final = {"large": "1.7B", "small": "0.6B"}
"""The published names of the two sizes, for reports."""

_USED_BY_WEB_SIDE: Final = {
    *("host", "port", "tls_cert", "tls_key", "web_workers", "worker_url", "api_title", "cors_origins"),
    *("worker_timeout", "allowed_hosts", "trusted_proxies", "root_path", "web_page"),
    *("max_connections", "max_connections_per_address", "body_buffer_mb"),
    *(
        "max_input_chars",
        "max_body_mb",
        "allow_ref_urls",
        "model_aliases",
        "unknown_voice",
        "provenance",
        "require_consent",
        "keys_file",
    ),
    *("input_format", "pronunciations", "replicas", "min_replicas", "scale_down_delay", "model_replicas"),
    *("audio_store_dir", "audio_store_mb", "audio_store_ttl"),
    *("drain_timeout", "log_level", "log_format", "otlp_endpoint"),
}
"""The public names of settings that the web side uses, alone or with the worker."""

SECRET: Final = {"worker_token", "api_keys", "admin_keys"}
"""The settings that no report, log or argument may have."""

_SIZE_SPELLINGS: Final = {"1.7b": "large", "0.6b": "small"}
_ORIGIN: Final = re.compile(
    r"http://[^\s/?#@A-Z]+(?<!:80)|https://[^\s/?#@A-Z]+(?<!:443)"
    r"|(?!https?:)[a-z][a-z0-9+.-]*://[^\s/?#@]+|file://"
)
"""The form of a browser's Origin header: of a site, of an extension or an app (`chrome-extension://…`), of a file."""

_HOST: Final = re.compile(r"\*|([a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", re.IGNORECASE)
_ROOT_PATH: Final = re.compile(r"((/[A-Za-z0-9_.~-]+)+)?")

_UNITS: Final = {"_s": "seconds", "_ms": "milliseconds", "_mb": "megabytes", "_days": "days"}
"""By the end of a field's name."""

_FORMS: Final = {
    "model_paths": "model=path",
    "model_aliases": "name=model",
    "model_replicas": "model=min:max",
    "quantization": "value or model=value",
}
"""The form of the pairs in settings that hold several."""

_TRUE: Final = {"1", "true", "yes", "on"}
_FALSE: Final = {"0", "false", "no", "off"}


def load_settings(environ: Mapping[str, str], *checks: Callable[[Settings], list[str]]) -> Settings:
    """The settings by the TTS_* variables of `environ`; an empty variable counts as not set.

    Each of `checks` returns more problems; it sees the default in the place of a wrong value.
    Raises SettingsError with all wrong values, unknown TTS_* variables and problems of the checks.
    """
    fields = {variable_of(field.name): field for field in msgspec.structs.fields(Settings)}
    given = {name: text.strip() for name, text in environ.items() if is_ours(name) and text.strip()}
    problems = [_unknown(name, fields) for name in sorted(given.keys() - fields.keys())]
    values: dict[str, Any] = {}
    for name in sorted(given.keys() & fields.keys()):
        field = fields[name]
        try:
            values[field.name] = _parse(field.name, field.type, given[name])
        except ValueError as error:
            problems.append(f"{name}: {error}")
    settings = Settings(**values)
    for check in (_problems, _address_problems, *checks):
        problems += check(settings)
    if problems:
        raise SettingsError(problems)
    return settings


def variables_of(settings: Settings) -> dict[str, str]:
    """The TTS_* variables that `load_settings` makes these settings of; those with their defaults are left out."""
    variables = {}
    for field in msgspec.structs.fields(Settings):
        value = getattr(settings, field.name)
        if value != getattr(_DEFAULTS, field.name):
            variables[variable_of(field.name)] = _text_of(value)
    return variables


def _text_of(value: Any) -> str:
    match value:
        case list():
            return ",".join(value)
        case dict():
            return ",".join(f"{name}={part}" for name, part in value.items())
        case _:
            return str(value)


def variable_of(field: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field.removesuffix("_s").upper()


def is_ours(name: str) -> bool:
    """True if a variable of this name was meant as a setting: TTS_PORT, but also tts_port or TTS-PORT."""
    return _normal(name).startswith(PREFIX)


def _normal(name: str) -> str:
    return re.sub(r"\W", "_", name).upper()


def _unknown(name: str, known: Iterable[str]) -> str:
    """The problem of a variable that is no setting, with the setting that was probably meant."""
    meant = difflib.get_close_matches(_normal(name), known, n=1, cutoff=0.8)
    return f"{name}: there is no such setting" + (f"; did you mean {meant[0]}?" if meant else "")


def _parse(name: str, kind: Any, text: str) -> Any:
    """`text` as a value of the field's type; the message of a ValueError never repeats a secret."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must be UTF-8")  # the interpreter puts surrogates in the place of other bytes
    choices = choices_in(kind)
    if choices:
        text = text.lower()
        text = _SIZE_SPELLINGS.get(text, text) if name == "default_model_size" else text
    raw: Any = text
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if plain is bool:
        if text.lower() not in _TRUE | _FALSE:
            raise ValueError(f"must be true or false, not {text!r}")
        raw = text.lower() in _TRUE
    elif get_origin(plain) is list:
        raw = [part.strip() for part in text.split(",") if part.strip()]
        if not raw:  # a list of keys that is empty by mistake would leave the service open
            raise ValueError("must have values, separated by commas; there is none")
    elif get_origin(plain) is dict:
        raw = _pairs(text, _FORMS[name])
        if name == "model_replicas":
            raw = {model: _bounds(bounds) for model, bounds in raw.items()}
    try:
        return msgspec.convert(raw, kind, strict=False, dec_hook=_to_path)
    except msgspec.ValidationError as error:
        problem = one_of(choices) if choices else reword(str(error), from_text=True)
        problem += _unit_of(name) if problem.endswith("number") else ""
        raise ValueError(problem if name in SECRET else f"{problem}, not {text!r}") from None


def _unit_of(name: str) -> str:
    return next((f" of {unit}" for suffix, unit in _UNITS.items() if name.endswith(suffix)), "")


def _pairs(text: str, form: str) -> dict[str, str]:
    pairs = {}
    for part in text.split(","):
        if "=" not in part and "value or" in form:
            part = f"{EVERY_MODEL}={part}"  # noqa: PLW2901 -- the same pair, spelled out
        name, separator, value = part.partition("=")
        if not separator or not name.strip() or not value.strip():
            raise ValueError(f"must be {form}, separated by commas, not {part.strip()!r}")
        pairs[name.strip()] = value.strip()
    return pairs


def _bounds(text: str) -> ReplicaBounds:
    parts = [part.strip() for part in text.split(":")]
    if not all(part.isdecimal() and 1 <= int(part) <= MAX_REPLICAS for part in parts) or len(parts) not in {1, 2}:
        form = f"min:max or min, each from 1 to {MAX_REPLICAS}"
        raise ValueError(f"must be {_FORMS['model_replicas']}, separated by commas, with {form}, not {text!r}")
    return ReplicaBounds(*map(int, parts))


def _to_path(_kind: type, value: Any) -> Path:
    """The hook for the one type of a setting that msgspec does not know."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError("begins with ~, but the user has no home folder") from None


def _problems(settings: Settings) -> list[str]:
    problems = []
    if settings.worker_url is not None:
        try:
            ipc_path(settings.worker_url)
        except AddressError as error:
            problems.append(f"{variable_of('worker_url')}: {error}")
    if settings.replicas is not None and (settings.min_replicas or 0) > settings.replicas:
        problems.append(f"{variable_of('min_replicas')}: is above {variable_of('replicas')}, {settings.replicas}")
    for model, bounds in settings.model_replicas.items():
        if bounds.minimum > bounds.maximum:
            problems.append(f"{variable_of('model_replicas')}: the minimum of {model} is above its maximum, {bounds}")
    for name in ("api_keys", "admin_keys"):
        if any(not key.isascii() or not key.isprintable() or " " in key for key in getattr(settings, name)):
            problems.append(f"{variable_of(name)}: every key must be printable ASCII without spaces")
    return problems


def _address_problems(settings: Settings) -> list[str]:
    problems = []
    for origin in settings.cors_origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            form = "http://, https:// or an extension's scheme, a host in lower case, no default port, and no path"
            problems.append(f"{variable_of('cors_origins')}: an origin is {form}; {origin!r} would match none")
    for host in settings.allowed_hosts:
        if not _HOST.fullmatch(host):
            form = "must be host names without scheme and path, or *"
            problems.append(f"{variable_of('allowed_hosts')}: {form}, not {host!r}")
    for network in settings.trusted_proxies:
        try:
            ipaddress.ip_network(network)
        except ValueError:
            form = "must be IP addresses and networks such as 172.16.0.0/12"
            problems.append(f"{variable_of('trusted_proxies')}: {form}, not {network!r}")
    if not _ROOT_PATH.fullmatch(settings.root_path):
        form = "must be a path such as /tts, without a slash at its end"
        problems.append(f"{variable_of('root_path')}: {form}, not {settings.root_path!r}")
    return problems
