"""`chameleon` against the running service."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.serve

MAIN = [sys.executable, "-c", "from deploy.cli import main; main()"]
FRANCE = "What is the capital of France?"


def test_clusters(service, chameleon) -> None:
    listed = json.loads(chameleon("clusters", "--url", service.url, "--json").stdout)
    assert len(listed["data"]) == 32
    shown = chameleon("clusters", "--url", service.url).stdout
    first = listed["data"][0]
    assert first["adapter_key"] in shown and first["characteristic_tokens"][0] in shown
    assert "32 clusters" in shown
    one = json.loads(chameleon("clusters", first["id"], "--url", service.url, "--json").stdout)
    assert one == first
    facts = chameleon("clusters", first["id"], "--url", f"{service.url}/v1").stdout
    assert " ".join(first["characteristic_tokens"]) in facts
    missing = chameleon("clusters", 9999, "--url", service.url)
    assert missing.exit_code == 2 and "9999" in missing.stderr


def test_clusters_are_watched_until_interrupted(service) -> None:
    command = [*MAIN, "clusters", "--watch", "--every", "0.1", "--url", service.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        heads = 0
        for line in process.stdout:
            heads += "characteristic" in line
            if heads == 2:
                break
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
    assert heads == 2 and "32 clusters" in rest
    assert process.returncode == 0


def test_a_message_in_a_pipe(service, chameleon) -> None:
    options = ["--url", service.url, "--temperature", "0", "--max-tokens", "12"]
    result = chameleon("chat", *options, input=FRANCE)
    assert "Paris" in result.stdout and "[" not in result.stdout
    assert "[cluster" in result.stderr or "[no cluster" in result.stderr
    asked = chameleon("chat", FRANCE, *options, "--adaptation", "off", "--quiet")
    assert "Paris" in asked.stdout and asked.stderr == ""
    forced = chameleon("chat", FRANCE, *options, "--adaptation", "3")
    assert "[cluster 3" in forced.stderr


def test_a_conversation_in_a_terminal(service) -> None:
    ours, theirs = pty.openpty()
    said = ["/adaptation off", FRANCE, "/adaptation 99999", "And?", "/what", "/history", "/quit"]
    os.write(ours, ("\n".join(said) + "\n").encode())
    options = ["--url", service.url, "--temperature", "0", "--max-tokens", "12"]
    result = subprocess.run(
        [*MAIN, "chat", *options],
        stdin=theirs,
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    os.close(ours)
    os.close(theirs)
    assert result.returncode == 0
    answer, _, rest = result.stdout.partition("[unadapted]")
    assert "Paris" in answer
    assert "99999" in rest and "there is no /what" in rest
    history = rest.partition("user: ")[2]
    assert history.startswith(FRANCE) and "assistant:" in history
    assert "And?" not in history, "a message that failed is not kept"


def test_bench(service, chameleon, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{FRANCE}\n\nCount to ten.\n")
    options = ["--url", service.url, "-n", "6", "-c", "3", "--max-tokens", "8"]
    result = chameleon("bench", *options, "--prompts", prompts, "--adaptation", "off", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["requests"], found["failed"], found["output_tokens"]) == (6, 0, 48)
    assert found["adaptation"] == {"off": 6}
    assert 0 < found["ttft_ms"]["p50"] <= found["latency_ms"]["p99"]
    assert found["ttft_ms"]["mean"] < found["latency_ms"]["mean"]
    shown = chameleon("bench", *options)
    assert "output tokens/s" in shown.stdout and "ttft_ms" in shown.stdout


def test_bench_counts_what_failed(service, chameleon) -> None:
    options = ["--url", service.url, "-n", "2", "-c", "1", "--max-tokens", "2"]
    result = chameleon("bench", *options, "--adaptation", "99999", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["failed"] == 2 and "99999" in next(iter(found["errors"]))


def test_the_published_schema_is_what_is_served(service, chameleon) -> None:
    served = httpx.get(f"{service.url}/openapi.json").json()
    printed = json.loads(chameleon("openapi").stdout)
    assert served["paths"].keys() == printed["paths"].keys()
    # The service of these tests asks for no keys.
    without = {name: one for name, one in printed["components"].items() if name == "schemas"}
    assert served["components"]["schemas"] == without["schemas"]
