"""The start and the end of the application on a Ray cluster; a fake stands for Ray and Serve."""

import contextlib
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from shared.settings import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray defines its own schemas in a deprecated way
    from ray.serve.schema import ApplicationStatus

    from server.cluster import deployment as module
    from server.cluster.deployment import Deployment, DeploymentError

pytestmark = pytest.mark.slow


class FakeRay:
    """A node with two CPUs, and a Serve whose application has `status`. `stopping` is set at the last of `looks`."""

    def __init__(self, status: ApplicationStatus, looks: int) -> None:
        self.stopping = threading.Event()
        self.calls: list[str] = []
        self.served_before = False
        self.open_requests = 0
        self.version = "mine"
        self._status = status
        self._looks = looks

    def status(self) -> Any:
        """Serve's status of the application."""
        if "run_many" not in self.calls:
            return SimpleNamespace(applications={"speech": None} if self.served_before else {})
        self._looks -= 1
        if not self._looks:
            self.stopping.set()
        states = {"RUNNING": 2, "STARTING": 97}
        engine = SimpleNamespace(status=self._status.value, message="no such package", replica_states=states)
        found = SimpleNamespace(status=self._status, message="see engine", deployments={"engine": engine})
        return SimpleNamespace(applications={"speech": found})

    def cluster_resources(self) -> dict[str, float]:
        """The resources of the node."""
        return {"CPU": 2.0}

    def nodes(self) -> list[dict[str, bool]]:
        """The one node."""
        return [{"Alive": True}]

    def get_app_handle(self, _name: str) -> Any:
        """The web workers."""
        self.calls.append("get_app_handle")

        def broadcast(method: str) -> Any:
            self.calls.append(method)
            return SimpleNamespace(results=lambda timeout_s: [self.open_requests + 0 * timeout_s])

        return SimpleNamespace(broadcast=broadcast)

    def __getattr__(self, name: str) -> Any:
        return lambda *_arguments, **_options: self.calls.append(name)


@pytest.mark.parametrize(
    ("address", "mode", "hinted"), [("head", None, True), ("head", "token", False), ("auto", None, False)]
)
def test_a_token_that_ray_does_not_look_for(
    monkeypatch: pytest.MonkeyPatch, address: str, mode: str | None, *, hinted: bool
) -> None:
    """With a host's address, Ray takes its token only if a variable says so; the message names it."""

    def refuse(**_options: Any) -> None:
        raise ConnectionError("no Ray cluster there")

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr(module.ray, "init", refuse)
    with pytest.raises(DeploymentError, match="no Ray cluster there") as raised:
        Deployment(Settings(), address).connect()
    assert ("RAY_AUTH_MODE=token" in str(raised.value)) == hinted


def deployment(monkeypatch: pytest.MonkeyPatch, fake: FakeRay) -> Deployment:
    """A deployment that is connected."""
    for name in ("ray", "serve"):
        monkeypatch.setattr(module, name, fake)
    monkeypatch.setattr(module, "_deployed_version", lambda: fake.version)
    monkeypatch.setattr(module, "_POLL_S", 0.001)
    monkeypatch.setattr(module, "_TELL_S", 0.0)
    found = Deployment(Settings(replicas=99), "auto" if fake.served_before else None)
    found.connect()
    return found


def test_replicas_that_find_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start says what it waits for, and ends at a signal; nothing is drained that was never whole."""
    fake = FakeRay(ApplicationStatus.DEPLOYING, looks=3)
    starting = deployment(monkeypatch, fake)
    with capture_logs() as lines:
        assert not starting.start(fake.stopping)
        starting.stop()
    assert [line["replicas"] for line in lines if line["event"] == "replicas_not_ready"] == [
        {"engine": {"RUNNING": 2, "STARTING": 97}}
    ] * 3
    assert fake.calls[-3:] == ["delete", "shutdown", "shutdown"]
    assert "get_app_handle" not in fake.calls


def test_an_application_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has Serve's reason, and that of the deployment that failed."""
    fake = FakeRay(ApplicationStatus.DEPLOY_FAILED, looks=3)
    with pytest.raises(DeploymentError, match="see engine\nno such package"):
        deployment(monkeypatch, fake).start(fake.stopping)


def test_an_application_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start ends when it runs."""
    fake = FakeRay(ApplicationStatus.RUNNING, looks=3)
    assert deployment(monkeypatch, fake).start(fake.stopping)


def test_an_application_that_another_process_has_deployed_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither drained nor deleted."""
    fake = FakeRay(ApplicationStatus.RUNNING, looks=3)
    running = deployment(monkeypatch, fake)
    assert running.start(fake.stopping)
    fake.version = "another"
    running.stop()
    assert not {"get_app_handle", "delete"} & set(fake.calls)
    assert fake.calls[-1] == "shutdown"


def test_an_end_in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running requests are cut off at once, and the application is taken away."""
    fake = FakeRay(ApplicationStatus.RUNNING, looks=3)
    running = deployment(monkeypatch, fake)
    assert running.start(fake.stopping)
    fake.open_requests = 3
    threading.Timer(0.1, running.hurry.set).start()
    running.stop()
    assert [call for call in fake.calls if call in {"drain", "cut_off", "delete"}] == ["drain", "cut_off", "delete"]
    assert fake.calls.count("open_requests") > 1


@pytest.mark.parametrize("status", [ApplicationStatus.DEPLOYING, ApplicationStatus.DEPLOY_FAILED])
def test_a_replacement_that_does_not_come(monkeypatch: pytest.MonkeyPatch, status: ApplicationStatus) -> None:
    """The replicas that served before are left to serve."""
    fake = FakeRay(status, looks=3)
    fake.served_before = True
    replacing = deployment(monkeypatch, fake)
    with contextlib.suppress(DeploymentError):
        assert not replacing.start(fake.stopping)
    replacing.stop()
    assert not {"get_app_handle", "delete"} & set(fake.calls)


def test_an_application_that_is_to_be_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is drained and deleted, although another process has deployed it; a cluster without it is a mistake."""
    fake = FakeRay(ApplicationStatus.RUNNING, looks=3)
    fake.served_before = True
    running = deployment(monkeypatch, fake)
    running.remove()
    running.stop()
    assert [call for call in fake.calls if call in {"get_app_handle", "delete"}] == ["get_app_handle", "delete"]
    fake.served_before = False
    with pytest.raises(DeploymentError, match="does not have the service"):
        deployment(monkeypatch, fake).remove()


def test_an_application_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command says so: Serve has not deleted it in time."""
    fake = FakeRay(ApplicationStatus.RUNNING, looks=3)
    fake.served_before = True

    def delete(_name: str) -> None:
        raise TimeoutError("not deleted within 60 s")

    monkeypatch.setattr(fake, "delete", delete, raising=False)
    with pytest.raises(DeploymentError, match="cannot be taken away: not deleted"):
        deployment(monkeypatch, fake).remove()
    assert fake.calls[-4:] == ["get_app_handle", "drain", "open_requests", "shutdown"]
