"""`chameleon serve`: what is checked first, and a real start to a real end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster_router.wire.errors import ConfigError
from deploy.cli.serve import SHIPPED
from deploy.environment import FRONT, SETTINGS
from deploy.serving import Overrides, check_port, read_config

SERVE = [sys.executable, "-c", "from deploy.cli import main; main()", "serve"]


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


IPV6 = has_ipv6()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """The shipped config with the args of its application changed."""

    def make(**args: Any) -> Path:
        document = yaml.safe_load(SHIPPED.read_text())
        document["applications"][0]["args"] |= args
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    return make


@pytest.mark.parametrize(
    "name", ["config.yaml", "multi_gpu.yaml", "tensor_parallel.yaml", "vllm.yaml"]
)
def test_shipped_configs_are_right(name: str) -> None:
    found = read_config(SHIPPED.with_name(name), Overrides())
    assert found.application == "chameleon" and found.port == 8000


def test_options_replace_the_config() -> None:
    found = read_config(SHIPPED, Overrides("0.0.0.0", 8123, "some-model", "none"))
    assert (found.host, found.port, found.url) == ("0.0.0.0", 8123, "http://127.0.0.1:8123")
    assert found.settings.model == "some-model" and found.settings.bundle is None
    shipped = read_config(SHIPPED, Overrides()).settings
    assert found.settings.engine == shipped.engine, "the rest stays"


@pytest.mark.parametrize(
    ("host", "found"), [("::", "[::1]"), ("::1", "[::1]"), ("fd00::7", "[fd00::7]"), ("h", "h")]
)
def test_the_url_is_one_wherever_it_listens(host: str, found: str) -> None:
    assert read_config(SHIPPED, Overrides(host)).url == f"http://{found}:8000"


@pytest.mark.skipif(not IPV6, reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::", "::1"])
def test_a_port_of_ipv6_is_checked(host: str) -> None:
    with socket.create_server((host, 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="--port"):
            check_port(host, port)
    check_port(host, port)


def test_serve_gets_our_environment_unless_told_otherwise(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(path: Path) -> dict[str, str]:
        options = read_config(path, Overrides()).document["controller_options"]
        return options["runtime_env"]["env_vars"]

    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    document = yaml.safe_load(config().read_text())
    path = tmp_path / "own.yaml"
    for options, found in (
        (None, dict(SETTINGS)),
        ({"runtime_env": {"env_vars": {"A": "1"}}}, {"A": "1", **SETTINGS}),
        ({"runtime_env": {"env_vars": {FRONT: "own:one"}}}, {**SETTINGS, FRONT: "own:one"}),
    ):
        path.write_text(yaml.safe_dump(document | {"controller_options": options}))
        assert named(path) == found
    for value in ("own:other", ""):
        monkeypatch.setenv(FRONT, value)
        assert named(path) == {**SETTINGS, FRONT: value}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"engine": {"max_sequences": 0}}, "max_sequences: Input should be greater than 0"),
        ({"bundle": "nothing"}, "'nothing' is neither a directory nor a shipped bundle"),
        ({"model": "./nowhere"}, "give a folder"),
        ({"access": {"keys": "/nowhere/keys.yaml"}}, "cannot read API keys"),
    ],
)
def test_wrong_settings_are_named_before_anything_starts(
    chameleon, config, default_model: Path, args: dict[str, Any], message: str
) -> None:
    result = chameleon("serve", config(**args), "--check")
    assert result.exit_code == 2 and message in result.stderr


def test_a_sound_config(chameleon, default_model: Path, tiny_llama: Path) -> None:
    result = chameleon("serve", "--check")
    assert result.exit_code == 0 and "32 clusters" in result.stderr
    other = chameleon("serve", "--check", "--model", tiny_llama)
    assert other.exit_code == 2 and "choose the bundle" in other.stderr
    assert chameleon("serve", "--check", "--model", tiny_llama, "--bundle", "none").exit_code == 0


def test_files_that_are_no_config(chameleon, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("- 1", "applications: [{name: x, import_path: other:app}]", "a: [", "{}"):
        path.write_text(text)
        result = chameleon("serve", path, "--check")
        assert result.exit_code == 2 and str(path) in result.stderr
    assert chameleon("serve", tmp_path / "missing.yaml").exit_code == 2


def test_a_taken_port(chameleon, tiny_llama: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = chameleon("serve", "--model", tiny_llama, "--bundle", "none", "--port", port)
    assert result.exit_code == 2 and "--port" in result.stderr


def test_from_the_start_to_ctrl_c(tiny_llama: Path) -> None:
    port = free_port()
    options = ["--model", str(tiny_llama), "--bundle", "none", "--port", str(port)]
    with subprocess.Popen([*SERVE, *options], stderr=subprocess.PIPE, text=True) as process:
        told = ""
        for line in process.stderr:
            told += line
            if "curl -N" in line:
                break
        assert f"ready at http://127.0.0.1:{port}" in told, told
        assert f"chameleon chat --url http://127.0.0.1:{port}" in told
        models = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"]
        assert models[0]["id"] == str(tiny_llama)
        late = httpx.get(
            f"http://127.0.0.1:{port}/v1/models", headers={"x-request-timeout-seconds": "0.00001"}
        )
        assert late.status_code == 504, "our part of the proxy speaks: Serve's own says 408"
        assert late.json()["error"]["code"] == "deadline_exceeded"
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=120)[1]
    assert process.returncode == 0
    assert "Traceback" not in rest


def test_what_serve_refuses_ends_it(config, tmp_path: Path, tiny_llama: Path) -> None:
    path = config(model=str(tiny_llama), bundle=None)
    document = yaml.safe_load(path.read_text())
    document["applications"][0]["deployments"] = [{"name": "Wheel", "num_replicas": 1}]
    path.write_text(yaml.safe_dump(document))
    result = subprocess.run(
        [*SERVE, str(path), "--port", str(free_port())],
        capture_output=True,
        check=False,
        text=True,
        timeout=240,
    )
    assert result.returncode == 1
    assert "the application cannot start" in result.stderr and "Wheel" in result.stderr
