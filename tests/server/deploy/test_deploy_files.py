"""The dashboard and the alerts ask for metrics that /metrics serves, with labels that these have."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import pytest
import pytest_asyncio
import yaml
from prometheus_client.parser import text_string_to_metric_families

import server
from shared.protocol import (
    BATCH_SIZE_BOUNDS,
    FIRST_AUDIO_BOUNDS_S,
    REAL_TIME_FACTOR_BOUNDS,
    TRANSITION_BOUNDS_S,
    UNDERRUN_BOUNDS_S,
    CacheStats,
    Histogram,
    ModelStats,
)
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP

DEPLOY: Final = Path(server.__file__).parent / "deploy"
RULES: Final = DEPLOY / "prometheus_rules.yaml"
DASHBOARD: Final[dict[str, Any]] = json.loads((DEPLOY / "grafana_dashboard.json").read_text())
PANELS: Final = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
OF_PROMETHEUS: Final = {"job", "instance"}
"""Labels that Prometheus adds."""

PROMTOOL: Final = shutil.which("promtool")
_SELECTOR: Final = re.compile(r"\b(tts_\w+)(?:\{([^}]*)\})?")
_MATCHER: Final = re.compile(r'(\w+)(=~|=|!=|!~)"([^"]*)"')
_GROUPING: Final = re.compile(r"\b(?:by|ignoring|on|group_left) \(([^)]*)\)")
_NAME_IN_TEXT: Final = re.compile(r"\btts_\w+")

Served = dict[str, list[dict[str, str]]]
"""The labels of all samples by their names."""


def _filled(bounds: tuple[float, ...]) -> Histogram:
    return Histogram(counts=[1] * (len(bounds) + 1), sum=1.0)


FIGURES: Final = ModelStats(
    first_audio_s=_filled(FIRST_AUDIO_BOUNDS_S),
    queue_wait_s=_filled(FIRST_AUDIO_BOUNDS_S),
    real_time_factor=_filled(REAL_TIME_FACTOR_BOUNDS),
    underrun_s=_filled(UNDERRUN_BOUNDS_S),
    batch_size=_filled(BATCH_SIZE_BOUNDS),
    captured_steps=1,
    eager_steps=1,
    transitions_s={kind: _filled(TRANSITION_BOUNDS_S) for kind in ("load", "restore", "offload", "drop")},
    failed_transitions={"load": 1},
)
"""A model that has done everything."""


def _alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def _expressions() -> Iterator[tuple[str, str]]:
    """The name of each alert or panel, and its expression."""
    for rule in _alerts():
        yield rule["alert"], rule["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def served(shared_worker: FakeWorker, services: Any) -> Served:
    """The answer of /metrics for a worker that has done everything."""
    shared_worker.reset()
    cache = CacheStats(name="tokens", model="m", entries=1, bytes=1, hits=1, misses=1)
    held = [msgspec.structs.replace(model, bytes={"weights": 1}) for model in shared_worker.snapshot.models]
    shared_worker.snapshot = msgspec.structs.replace(
        shared_worker.snapshot, model_stats={"m": FIGURES}, caches=[cache], models=held
    )
    client: httpx.AsyncClient = await services.client()
    found: Served = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def _problems(expression: str, served: Served) -> Iterator[str]:
    """The metrics and labels in an expression that are not served."""
    labels: set[str] = set(OF_PROMETHEUS)
    for name, matchers in _SELECTOR.findall(expression):
        if name not in served:
            yield f"there is no {name}"
            continue
        labels |= served[name][0].keys()
        for label, operator, value in _MATCHER.findall(matchers):
            if label not in OF_PROMETHEUS and not _matches(operator, value, {one.get(label) for one in served[name]}):
                yield f"no {name} has {label}{operator}{value}"
    for group in _GROUPING.findall(expression):
        yield from (f"no metric has the label {label}" for label in group.split(", ") if label and label not in labels)


def _matches(operator: str, value: str, values: set[str | None]) -> bool:
    """Whether a matcher finds something, and each alternative of it does. A variable stands for some value."""
    if None in values:
        return False
    return value.startswith("$") or operator.startswith("!") or set(value.split("|")) <= values


@SHARED_LOOP
async def test_every_metric_exists(served: Served) -> None:
    """Every metric that is asked for is served, with those labels, and with those values of them."""
    asked = list(_expressions())
    assert len(asked) > 40
    assert {source: list(_problems(expression, served)) for source, expression in asked} == {
        source: [] for source, _ in asked
    }


@SHARED_LOOP
async def test_wrong_expressions_are_found(served: Served) -> None:
    """The test before this one would notice a name, a label or a value that is wrong."""
    for wrong in (
        "tts_nothing",
        'tts_slots{model="m"}',
        'tts_requests_total{outcome="lost"}',
        'tts_model_moves_total{move=~"load|fall"}',
        "sum by (colour) (tts_slots)",
    ):
        assert list(_problems(wrong, served)), wrong


@SHARED_LOOP
async def test_nothing_is_left_out(served: Served) -> None:
    """The dashboard shows every family but a few that another one has, too."""
    shown = {name for _, expression in _expressions() for name in _NAME_IN_TEXT.findall(expression)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in served}
    known = {"tts_worker_uptime_seconds", "tts_requests_started_total", "tts_cache_entries", "tts_cache_bytes"}
    assert families - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} == known


class TestDashboard:
    """The file for Grafana."""

    def test_legends(self) -> None:
        """A legend names only labels that its expression keeps."""
        for panel in PANELS:
            for target in panel["targets"]:
                named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
                groups = [set(group.split(", ")) for group in re.findall(r"by \(([^)]*)\)", target["expr"])]
                kept = set.union(*groups) if groups else OF_PROMETHEUS | {"kind"}
                assert named <= kept, (panel["title"], target["legendFormat"])

    def test_variables(self) -> None:
        """Every variable that is used is defined, and every panel asks the chosen data source."""
        variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
        assert used == variables
        assert all(panel["datasource"]["uid"] == "${datasource}" for panel in PANELS)

    def test_panels(self) -> None:
        """Ids and places are unique, and no panel lies on another one."""
        panels = DASHBOARD["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        taken = [
            (x, y)
            for place in (panel["gridPos"] for panel in panels)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(taken) == len(set(taken))
        assert max(x for x, _ in taken) < 24

    def test_exemplars(self) -> None:
        """The time to first audio shows single requests."""
        (panel,) = [panel for panel in PANELS if panel["title"] == "Time to first audio"]
        assert all(target["exemplar"] for target in panel["targets"])


class TestRules:
    """The file for Prometheus."""

    def test_every_alert_says_what_to_do(self) -> None:
        """Each has a summary, an action and a severity, and names only settings and metrics that exist."""
        for rule in _alerts():
            assert rule["annotations"].keys() == {"summary", "action"}, rule["alert"]
            assert rule["labels"]["severity"] in {"critical", "warning", "info"}

    @SHARED_LOOP
    async def test_actions_name_what_exists(self, served: Served) -> None:
        """The metrics in the advice are served."""
        for rule in _alerts():
            assert set(_NAME_IN_TEXT.findall(rule["annotations"]["action"])) <= {
                re.sub(r"_(bucket|sum|count)$", "", name) for name in served
            }

    @pytest.mark.parametrize(
        "command", [["check", "rules", str(RULES)], ["test", "rules", str(Path(__file__).with_name("rules_test.yaml"))]]
    )
    def test_promtool(self, command: list[str]) -> None:
        """Prometheus reads the rules, and each alert fires when it should and not otherwise."""
        if PROMTOOL is None:
            pytest.skip("promtool is not installed (Debian: prometheus)")
        done = subprocess.run([PROMTOOL, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_every_alert_is_tested(self) -> None:
        """The file for promtool has each of them."""
        tested = Path(__file__).with_name("rules_test.yaml").read_text()
        assert [rule["alert"] for rule in _alerts() if rule["alert"] not in tested] == []
