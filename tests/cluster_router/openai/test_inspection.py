import threading
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from cluster_router.clusters import Assigner

MODEL = "tiny/bytes"


async def test_models_through_the_official_client(client: AsyncOpenAI) -> None:
    [model] = (await client.models.list()).data
    assert (model.id, model.created, model.object) == (MODEL, 1_700_000_000, "model")
    assert model.context_length == 256
    assert await client.models.retrieve(MODEL) == model


async def test_clusters(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/clusters")).json()
    assert listed["snapshot_version"] == 5
    assert [(c["id"], c["size"], c["version"]) for c in listed["data"]] == [(3, 100, 2), (8, 7, 5)]
    one = (await http.get("/v1/clusters/8")).json()
    assert one == listed["data"][1]
    assert one["object"] == "cluster"


async def test_an_adapter_is_a_zip_with_a_name(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/clusters/8/adapter")
    key = (await http.get("/v1/clusters/8")).json()["adapter_key"]
    assert answer.content == b"PK" + key.encode() + b"whole"
    plain = await http.get("/v1/clusters/8/adapter?form=plain")
    assert plain.content == b"PK" + key.encode() + b"plain"
    assert (await http.get("/v1/clusters/8/adapter?form=half")).status_code == 400
    assert answer.headers["content-type"] == "application/zip"
    disposition = answer.headers["content-disposition"]
    assert disposition == 'attachment; filename="tiny-bytes-cluster-8.zip"'


@pytest.mark.parametrize(
    ("body", "cluster", "tokens"),
    [
        ({"prompt": "xxxx"}, 3, 4),
        ({"prompt": ["yy"], "model": MODEL}, 8, 2),
        ({"prompt": "xxxx", "adaptation": 8}, 8, 4),
        ({"messages": [{"role": "user", "content": "yyy"}]}, 8, len("<|user|>yyy<|assistant|>")),
        ({"prompt": "x" * 256}, 3, 256),
    ],
)
async def test_assign_generates_nothing(
    http: httpx.AsyncClient, worker: Any, body: dict[str, Any], cluster: int | None, tokens: Any
) -> None:
    answer = (await http.post("/v1/assign", json=body)).json()
    assert answer["adaptation"]["cluster"] == cluster
    assert answer["prompt_tokens"] == tokens
    assert (answer["object"], answer["model"]) == ("assignment", MODEL)
    assert not worker.requests


async def test_assign_and_answer_agree_on_the_adapter(
    http: httpx.AsyncClient, client: AsyncOpenAI
) -> None:
    assigned = (await http.post("/v1/assign", json={"prompt": "xyxx"})).json()
    answer = await client.completions.create(model=MODEL, prompt="xyxx")
    assert answer.adaptation == assigned["adaptation"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"messages": []}, 400),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400),
        ({"prompt": ["x", "y"]}, 400),
        ({"prompt": ""}, 400),
        ({"prompt": "x", "model": "other"}, 404),
        ({"prompt": "x", "adaptation": 99}, 404),
        ({"prompt": "x", "namespace": "\t"}, 400),
        ({"prompt": "x", "learn": True}, 400),
        ({"prompt": "x", "temperature": 1}, 400),
    ],
)
async def test_assign_refuses(http: httpx.AsyncClient, body: dict[str, Any], status: int) -> None:
    answer = await http.post("/v1/assign", json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_assign_does_not_learn(http: httpx.AsyncClient, worker: Any) -> None:
    await http.post("/v1/assign", json={"prompt": "xxxx"})
    assert worker.observed == []


async def test_what_is_learned_from_and_for_whom(http: httpx.AsyncClient, worker: Any) -> None:
    ask = {"model": MODEL, "prompt": ["x", "y"], "n": 2}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    for fields in ({}, {"namespace": "a"}, {"learn": False}, {"learn": True, "namespace": None}):
        await http.post("/v1/completions", json=ask | fields)
        await http.post("/v1/chat/completions", json=chat | fields)
    assert worker.observed == [""] * 3 + ["a"] * 3 + [""] * 3, "once a prompt, not once a choice"


@pytest.mark.parametrize("path", ["/v1/clusters", "/v1/clusters/8"])
async def test_clusters_are_named_in_a_thread(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    named_in: list[int] = []
    infos = Assigner._infos

    def noted(*args: Any) -> Any:
        named_in.append(threading.get_ident())
        return infos(*args)

    monkeypatch.setattr(Assigner, "_infos", noted)
    assert (await http.get(path)).status_code == 200
    assert len(named_in) == 1 and threading.get_ident() not in named_in


@pytest.mark.parametrize("path", ["", "/8", "/8/adapter"])
async def test_clusters_of_a_namespace(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(f"/v1/clusters{path}", params={"namespace": "new"})
    assert answer.status_code == 200
    answer = await http.get(f"/v1/clusters{path}", params={"namespace": "n" * 129})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "namespace"
    assert "at most 128 printable characters" in error["message"]


async def test_probes(http: httpx.AsyncClient, stage: SimpleNamespace) -> None:
    assert (await http.get("/health")).text == "ok"
    assert (await http.get("/ready")).status_code == 200
    stage.reason = "no LM replica is up"
    answer = await http.get("/ready")
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "Not ready: no LM replica is up"
    assert (await http.get("/health")).status_code == 200


async def test_the_openapi_document_names_fields_and_errors(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest"):
        assert schemas[name]["additionalProperties"] is False
        assert {"adaptation", "namespace", "learn", "top_k", "seed"} <= set(
            schemas[name]["properties"]
        )
    for name in ("CompletionRequest", "ChatRequest", "ChatMessage", "StreamOptions"):
        for field, one in schemas[name]["properties"].items():
            # A field without a type of its own takes only what asks for nothing.
            assert {"type", "anyOf", "enum", "$ref"} & set(one) or one.get("description"), field
    assert schemas["CompletionRequest"]["required"] == ["model", "prompt"]
    for path, methods in document["paths"].items():
        for method in methods.values():
            assert method["summary"], path
            assert "422" not in method["responses"], path
            assert "4XX" in method["responses"], path
    answer = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(answer) == {"application/json", "text/event-stream"}


async def test_answers_fit_the_documented_schema(http: httpx.AsyncClient) -> None:
    from pydantic import TypeAdapter

    from cluster_router.openai.schema import ChatCompletion, Completion

    text = {"model": MODEL, "prompt": ["x", "y"], "logprobs": 1, "echo": True}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "logprobs": True}
    for shape, path, body in (
        (Completion, "/v1/completions", text),
        (ChatCompletion, "/v1/chat/completions", chat),
    ):
        answer = (await http.post(path, json=body)).json()
        assert TypeAdapter(shape).validate_python(answer, extra="forbid") == answer


def test_ranges_are_those_of_the_engine() -> None:
    from cluster_router.openai.common import SamplingFields
    from cluster_router.wire.types import SamplingParams

    shared = set(SamplingFields.model_fields) & set(SamplingParams.model_fields)
    ranged = {"temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty"}
    assert ranged <= shared
    for name in ranged | {"frequency_penalty", "min_tokens"}:
        ours = SamplingFields.model_json_schema()["properties"][name]["anyOf"][0]
        wire = SamplingParams.model_json_schema()["properties"][name]
        bounds = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
        assert {b: ours.get(b) for b in bounds} == {b: wire.get(b) for b in bounds}, name
