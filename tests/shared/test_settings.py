"""Settings: each TTS_* variable, all mistakes in one message, and no secret in any message."""

from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from shared.settings import ReplicaBounds, Settings, SettingsError, load_settings, variable_of, variables_of

VALID: list[tuple[str, str, Any]] = [
    ("TTS_HOST", "0.0.0.0", "0.0.0.0"),  # noqa: S104 -- nothing is bound
    ("TTS_PORT", "65535", 65535),
    ("TTS_WEB_WORKERS", "2", 2),
    ("TTS_REPLICAS", "4", 4),
    ("TTS_WORKER_URL", "ipc:///run/tts/worker.ipc", "ipc:///run/tts/worker.ipc"),
    ("TTS_WORKER_TOKEN", "hush", "hush"),
    ("TTS_WORKER_TIMEOUT", "15", 15.0),
    ("TTS_API_TITLE", "My speech", "My speech"),
    ("TTS_API_KEYS", "sk-1, sk-2,,", ["sk-1", "sk-2"]),
    ("TTS_ADMIN_KEYS", "sk-admin", ["sk-admin"]),
    ("TTS_USAGE_FILE", "/var/lib/tts/usage.sqlite", Path("/var/lib/tts/usage.sqlite")),
    ("TTS_USAGE_DAYS", "30", 30),
    ("TTS_TLS_CERT", "/etc/tts/cert.pem", Path("/etc/tts/cert.pem")),
    ("TTS_TLS_KEY", "/etc/tts/key.pem", Path("/etc/tts/key.pem")),
    ("TTS_KEYS_FILE", "/etc/tts/keys.toml", Path("/etc/tts/keys.toml")),
    ("TTS_WEB_PAGE", "false", False),
    ("TTS_CORS_ORIGINS", "https://a.example,http://b.example:8080", ["https://a.example", "http://b.example:8080"]),
    ("TTS_ALLOWED_HOSTS", "tts.example,box:8080,[::1]", ["tts.example", "box:8080", "[::1]"]),
    ("TTS_TRUSTED_PROXIES", "172.16.0.0/12, ::1", ["172.16.0.0/12", "::1"]),
    ("TTS_ROOT_PATH", "/a/tts", "/a/tts"),
    ("TTS_MAX_CONNECTIONS", "64", 64),
    ("TTS_MAX_CONNECTIONS_PER_ADDRESS", "1", 1),
    ("TTS_BODY_BUFFER_MB", "16", 16),
    ("TTS_MAX_INPUT_CHARS", "100000", 100_000),
    ("TTS_MAX_BODY_MB", "32", 32),
    ("TTS_ALLOW_REF_URLS", "yes", True),
    ("TTS_INPUT_FORMAT", "Markdown", "markdown"),
    ("TTS_PRONUNCIATIONS", "words.toml", Path("words.toml")),
    ("TTS_AUDIO_STORE_DIR", "kept", Path("kept")),
    ("TTS_AUDIO_STORE_MB", "0", 0),
    ("TTS_AUDIO_STORE_TTL", "60", 60.0),
    ("TTS_MAX_CONCURRENCY", "12", 12),
    ("TTS_MAX_QUEUE", "1", 1),
    ("TTS_OPEN_TEXT_TIMEOUT", "5.5", 5.5),
    ("TTS_AUDIO_BUFFER_MB", "16", 16),
    ("TTS_STALL_TIMEOUT", "30", 30.0),
    ("TTS_DRAIN_TIMEOUT", "0.5", 0.5),
    ("TTS_DEFAULT_DEVICE", "CPU", "cpu"),
    ("TTS_DEFAULT_MODEL", "espeak-ng", "espeak-ng"),
    ("TTS_DEFAULT_MODEL_SIZE", "0.6b", "small"),
    ("TTS_ATTENTION_BACKEND", "Flash_Attention_2", "flash_attention_2"),
    ("TTS_KERNELS", "Torch", "torch"),
    ("TTS_DTYPE", "bfloat16", "bfloat16"),
    ("TTS_CODEC_DTYPE", "float32", "float32"),
    ("TTS_MODELS_DIR", "/data/models", Path("/data/models")),
    ("TTS_MODEL_PATHS", "a=/x/a, b=/x/b", {"a": Path("/x/a"), "b": Path("/x/b")}),
    ("TTS_MIN_REPLICAS", "0", 0),
    ("TTS_SCALE_DOWN_DELAY", "60", 60.0),
    ("TTS_MODEL_REPLICAS", "a=2:4, b=3", {"a": ReplicaBounds(2, 4), "b": ReplicaBounds(3, 10_000)}),
    ("TTS_MODEL_ALIASES", "a=tts-1, b/c=x", {"a": "tts-1", "b/c": "x"}),
    ("TTS_UNKNOWN_VOICE", "Default", "default"),
    ("TTS_REQUIRE_CONSENT", "yes", True),
    ("TTS_PROVENANCE", "off", False),
    ("TTS_AUDIT_LOG", "/var/log/tts/audit.jsonl", Path("/var/log/tts/audit.jsonl")),
    ("TTS_AUDIT_KEY_FILE", "/etc/tts/audit.key", Path("/etc/tts/audit.key")),
    ("TTS_ALLOW_DOWNLOAD", "on", True),
    ("TTS_VOICES_DIR", "~/voices", Path("~/voices").expanduser()),
    ("TTS_MAX_VOICES", "0", 0),
    ("TTS_REFERENCE_CACHE_MB", "1", 1),
    ("TTS_SENTENCE_PAUSE_MS", "0", 0),
    ("TTS_PRELOAD", "a,b", ["a", "b"]),
    ("TTS_IDLE_TIMEOUT", "0.001", 0.001),
    ("TTS_HOST_IDLE_TIMEOUT", "60", 60.0),
    ("TTS_CLEANUP_INTERVAL", "1e3", 1000.0),
    ("TTS_CLEANUP_ENABLED", "FALSE", False),
    ("TTS_CPU_THREADS", "4", 4),
    ("TTS_QUANTIZATION", "INT8,tts-small=fp16", {"*": "int8", "tts-small": "fp16"}),
    ("TTS_VRAM_BUDGET_MB", "8000", 8000),
    ("TTS_HOST_BUDGET_MB", "1", 1),
    ("TTS_LOG_LEVEL", "DEBUG", "debug"),
    ("TTS_LOG_FORMAT", "json", "json"),
    ("TTS_OTLP_ENDPOINT", "http://collector:4318", "http://collector:4318"),
]

INVALID: list[tuple[str, str, str]] = [
    ("TTS_HOST", "h" * 256, "255"),
    ("TTS_PORT", "0", "must be at least 1"),
    ("TTS_PORT", "65536", "must be at most 65535"),
    ("TTS_PORT", "http", "'http'"),
    ("TTS_PORT", "80.5", "'80.5'"),
    ("TTS_WEB_WORKERS", "65", "must be at most 64"),
    ("TTS_REPLICAS", "0", "must be at least 1"),
    ("TTS_WORKER_TIMEOUT", "1", "must be at least 2"),
    ("TTS_WORKER_URL", "tcp://127.0.0.1:1", "ipc:///absolute/path"),
    ("TTS_WORKER_URL", "ipc://worker.ipc", "must be absolute"),
    ("TTS_API_KEYS", "good,with space", "printable ASCII"),
    ("TTS_ADMIN_KEYS", "schlüssel", "printable ASCII"),
    ("TTS_API_KEYS", ",", "there is none"),
    ("TTS_ADMIN_KEYS", " , ,", "there is none"),
    ("TTS_PRELOAD", ",,", "there is none"),
    ("TTS_CORS_ORIGINS", "a.example", "http://"),
    ("TTS_CORS_ORIGINS", "https://a.example/", "would match none"),
    ("TTS_CORS_ORIGINS", "https://a.example/page", "would match none"),
    ("TTS_CORS_ORIGINS", "https://A.example", "would match none"),
    ("TTS_CORS_ORIGINS", "https://a.example:443", "would match none"),
    ("TTS_CORS_ORIGINS", "http://", "would match none"),
    ("TTS_CORS_ORIGINS", "HTTPS://a.example", "would match none"),
    ("TTS_CORS_ORIGINS", "null", "would match none"),
    ("TTS_ALLOWED_HOSTS", "https://a.example", "without scheme and path, or *, not 'https://a.example'"),
    ("TTS_ALLOWED_HOSTS", "a.example/tts", "without scheme and path"),
    ("TTS_TRUSTED_PROXIES", "10.0.0.1/8", "IP addresses and networks"),
    ("TTS_TRUSTED_PROXIES", "nginx", "must be IP addresses and networks such as 172.16.0.0/12, not 'nginx'"),
    ("TTS_ROOT_PATH", "tts", "must be a path such as /tts"),
    ("TTS_ROOT_PATH", "/tts/", "without a slash at its end"),
    ("TTS_ROOT_PATH", "/t ts", "must be a path"),
    ("TTS_MAX_INPUT_CHARS", "-1", "must be at least 1"),
    ("TTS_MAX_CONCURRENCY", "none", "'none'"),
    ("TTS_MAX_QUEUE", "0", "must be at least 1"),
    ("TTS_AUDIO_BUFFER_MB", "15", "must be at least 16"),
    ("TTS_STALL_TIMEOUT", "0", "must be more than 0"),
    ("TTS_IDLE_TIMEOUT", "nan", "'nan'"),
    ("TTS_IDLE_TIMEOUT", "inf", "must be at most 31536000"),
    ("TTS_IDLE_TIMEOUT", "5m", "'5m'"),
    ("TTS_PORT", "abc", "must be a whole number, not 'abc'"),
    ("TTS_MAX_QUEUE", "0", "must be at least 1, not '0'"),
    ("TTS_VRAM_BUDGET_MB", "all", "must be a whole number of megabytes, not 'all'"),
    ("TTS_IDLE_TIMEOUT", "soon", "must be a number of seconds, not 'soon'"),
    ("TTS_CLEANUP_ENABLED", "maybe", "must be true or false, not 'maybe'"),
    ("TTS_DEFAULT_DEVICE", "tpu", "must be one of auto, cuda, cpu, not 'tpu'"),
    ("TTS_DEFAULT_MODEL_SIZE", "7B", "must be one of large, small"),
    ("TTS_ATTENTION_BACKEND", "paged", "one of auto, eager, sdpa, flash_attention_2"),
    ("TTS_KERNELS", "cuda", "one of auto, torch, triton"),
    ("TTS_DTYPE", "int8", "one of auto, float32"),
    ("TTS_MODEL_PATHS", "just-a-path", "model=path"),
    ("TTS_QUANTIZATION", "int4", "one of auto, none, fp16, int8, fp8, not 'int4'"),
    ("TTS_QUANTIZATION", "int8,=none", "value or model=value"),
    ("TTS_MODEL_PATHS", "a=,b=/x", "model=path"),
    ("TTS_MODEL_ALIASES", "tts-1", "name=model"),
    ("TTS_MIN_REPLICAS", "-1", "must be at least 0"),
    ("TTS_SCALE_DOWN_DELAY", "0", "must be more than 0"),
    ("TTS_MODEL_REPLICAS", "a", "model=min:max"),
    ("TTS_MODEL_REPLICAS", "a=1:2:3", "min:max or min, each from 1 to 10000"),
    ("TTS_MODEL_REPLICAS", "a=many", "min:max or min, each from 1 to 10000"),
    ("TTS_MODEL_REPLICAS", "a=0:2", "each from 1 to 10000, not '0:2'"),
    ("TTS_MODEL_REPLICAS", "a=1:10001", "each from 1 to 10000"),
    ("TTS_MODEL_REPLICAS", "a=3:2", "the minimum of a is above its maximum, 3:2"),
    ("TTS_UNKNOWN_VOICE", "first", "one of refuse, default"),
    ("TTS_INPUT_FORMAT", "html", "one of auto, text, markdown, ssml"),
    ("TTS_LOG_LEVEL", "loud", "one of debug, info"),
    ("TTS_LOG_FORMAT", "xml", "one of console, json"),
    ("TTS_API_TITLE", "B\udcfccherei", "must be UTF-8"),
    ("TTS_MODELS_DIR", "~no_such_user/models", "has no home folder"),
    ("tts_port", "8001", "there is no such setting; did you mean TTS_PORT?"),
    ("TTS-PORT", "8001", "there is no such setting; did you mean TTS_PORT?"),
    ("TTS_API_KEY", "hush", "there is no such setting; did you mean TTS_API_KEYS?"),
    ("TTS_COLOUR", "red", "there is no such setting"),
]


class TestValues:
    """The values of each variable."""

    @pytest.mark.parametrize(("name", "text", "value"), VALID, ids=[name for name, *_ in VALID])
    def test_valid(self, name: str, text: str, value: Any) -> None:
        """A value gets into its field, with the field's type, and changes no other field."""
        field = next(field.name for field in msgspec.structs.fields(Settings) if variable_of(field.name) == name)
        assert load_settings({name: f" {text} "}) == msgspec.structs.replace(Settings(), **{field: value})

    def test_variables_of(self) -> None:
        """The variables of settings give the same settings again; defaults need none."""
        settings = load_settings({name: text for name, text, _ in VALID})
        assert load_settings(variables_of(settings)) == settings
        assert variables_of(Settings()) == {}

    def test_every_variable_is_tested(self) -> None:
        """Each setting has a line in VALID."""
        fields = msgspec.structs.fields(Settings)
        assert {name for name, *_ in VALID} == {variable_of(field.name) for field in fields}

    @pytest.mark.parametrize(("name", "text", "problem"), INVALID)
    def test_invalid(self, name: str, text: str, problem: str) -> None:
        """The message for a wrong value has the variable and the right form."""
        with pytest.raises(SettingsError) as caught:
            load_settings({name: text})
        (line,) = caught.value.problems
        assert line.startswith(f"{name}: ")
        assert problem in line

    @pytest.mark.parametrize(
        "origin",
        [
            *("*", "https://*.example", "http://a.example:443", "http://[::1]:8080"),
            "chrome-extension://abcdefghijklmnopabcdefghijklmnop",
            "moz-extension://7a2f6b4e-5a05-4b43-9d2c-1f3f4d5b6c7e",
            "safari-web-extension://E5A1B2C3-5A05-4B43-9D2C-1F3F4D5B6C7E",
            *("app://obsidian.md", "app://.", "capacitor://localhost", "tauri://localhost", "file://"),
        ],
    )
    def test_other_origins(self, origin: str) -> None:
        """A star, alone or within an origin, ports, IPv6 addresses, extensions and apps are accepted."""
        assert load_settings({"TTS_CORS_ORIGINS": origin}).cors_origins == [origin]

    @pytest.mark.parametrize("text", ["1", "true", "Yes", "ON"])
    def test_true(self, text: str) -> None:
        """The usual words for true are accepted, in any case."""
        assert load_settings({"TTS_ALLOW_DOWNLOAD": text}).allow_download

    @pytest.mark.parametrize("text", ["0", "false", "No", "OFF"])
    def test_false(self, text: str) -> None:
        """The usual words for false are accepted, in any case."""
        assert not load_settings({"TTS_CLEANUP_ENABLED": text}).cleanup_enabled


class TestTogether:
    """All variables at once."""

    def test_nothing_set(self) -> None:
        """Without variables the defaults hold, and the port is not reachable from other machines."""
        assert load_settings({}) == Settings()
        assert load_settings({"PATH": "/bin", "TTSX": "1"}) == Settings()
        assert Settings().host == "127.0.0.1"

    def test_empty_is_not_set(self) -> None:
        """An empty variable, as compose files make them, counts as not set, even with an unknown name."""
        assert load_settings({"TTS_PORT": "", "TTS_MAX_QUEUE": "  ", "TTS_UNKNOWN": ""}) == Settings()

    def test_every_mistake_at_once(self) -> None:
        """One message has all mistakes: values, unknown names, and values that are wrong together."""
        with pytest.raises(SettingsError) as caught:
            load_settings(
                {
                    "TTS_PORT": "http",
                    "TTS_IDLE_TIMOUT": "5",
                    "TTS_DTYPE": "int8",
                    "TTS_WORKER_URL": "tcp://x",
                    "TTS_CORS_ORIGINS": "x",
                    "TTS_HOST": "::1",
                },
            )
        named = [line.split(":")[0] for line in caught.value.problems]
        assert sorted(named) == ["TTS_CORS_ORIGINS", "TTS_DTYPE", "TTS_IDLE_TIMOUT", "TTS_PORT", "TTS_WORKER_URL"]
        assert "TTS_IDLE_TIMOUT: there is no such setting" in str(caught.value)
        assert str(caught.value).count("\n") == 5

    def test_more_replicas_at_least_than_at_most(self) -> None:
        """The message has both."""
        with pytest.raises(SettingsError, match="TTS_MIN_REPLICAS: is above TTS_REPLICAS, 2"):
            load_settings({"TTS_MIN_REPLICAS": "3", "TTS_REPLICAS": "2"})


class TestSecrets:
    """Keys and tokens are never shown."""

    SECRETS: ClassVar = ("hush-token", "sk-user", "sk-admin")

    def test_public(self) -> None:
        """`public` gives plain JSON by the public names, without the secrets."""
        settings = load_settings(
            {
                "TTS_WORKER_TOKEN": "hush-token",
                "TTS_API_KEYS": "sk-user",
                "TTS_ADMIN_KEYS": "sk-admin",
                "TTS_MODEL_PATHS": "a=/x",
                "TTS_DEFAULT_MODEL_SIZE": "small",
            },
        )
        shown = settings.public()
        text = msgspec.json.encode(shown).decode()
        assert not any(secret in text for secret in self.SECRETS)
        assert not {"worker_token", "api_keys", "admin_keys"} & shown.keys()
        assert (shown["idle_timeout"], shown["cleanup_interval"]) == (300.0, 30.0)
        assert (shown["default_model_size"], shown["model_paths"]) == ("0.6B", {"a": "/x"})
        assert load_settings({}).public()["default_model_size"] == "1.7B"

    def test_of_worker(self) -> None:
        """`worker_public` gives public settings, and none that the web side uses."""
        settings = load_settings({"TTS_WORKER_TOKEN": "hush-token", "TTS_IDLE_TIMEOUT": "5", "TTS_PORT": "8001"})
        told = settings.worker_public()
        assert told.items() < settings.public().items()
        assert (told["idle_timeout"], told["max_queue"], told["dtype"]) == (5.0, 64, "auto")
        assert not {"port", "host", "worker_url", "cors_origins", "max_input_chars", "log_level"} & told.keys()

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("TTS_WORKER_TOKEN", "hush-token" * 30),
            ("TTS_API_KEYS", "sk-user with a space"),
            ("TTS_ADMIN_KEYS", "sk-admin\u00e4"),
        ],
    )
    def test_not_in_errors(self, name: str, text: str) -> None:
        """The message for a wrong secret has its variable, not its value."""
        with pytest.raises(SettingsError) as caught:
            load_settings({name: text, "TTS_PORT": "0"})
        assert name in str(caught.value)
        assert not any(secret in str(caught.value) for secret in self.SECRETS)
