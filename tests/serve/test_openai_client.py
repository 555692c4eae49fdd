"""The official client against the running service."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile

import httpx
import pytest
from openai import BadRequestError, NotFoundError

pytestmark = pytest.mark.serve

BANKING = (
    "I was charged twice for one transfer and the second payment has not been returned to my "
    "account. I have already waited three days for the refund. How do I get my money back, and "
    "can you cancel the pending transfer?"
)
GREEDY = {"temperature": 0, "max_tokens": 12}


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_models(service) -> None:
    [model] = service.openai().models.list().data
    assert model.id == service.model


def test_a_sensible_answer(service) -> None:
    answer = service.openai().chat.completions.create(
        model=service.model, messages=chat("What is the capital of France?"), **GREEDY
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_equals_whole(service) -> None:
    client, asked = service.openai(), {"model": service.model, "messages": chat(BANKING), **GREEDY}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 3
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    # The second time the prompt's keys and values are at hand.
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    assert chunks[0].adaptation == whole.adaptation


def test_answers_say_what_adapted_them(service) -> None:
    client = service.openai()
    asked = {"model": service.model, "prompt": BANKING, "max_tokens": 1}
    found = client.completions.create(**asked).adaptation
    assert found["mode"] == "cluster" and 0 < found["similarity"] <= 1
    assert len(found["adapter_key"]) == 16
    off = client.completions.create(**asked, extra_body={"adaptation": "off"}).adaptation
    assert off["mode"] == "off" and off["adapter_key"] is None
    other = (found["cluster"] + 1) % 8
    forced = client.completions.create(**asked, extra_body={"adaptation": other}).adaptation
    assert forced["cluster"] == other and forced["adapter_key"] != found["adapter_key"]


def test_adaptation_changes_the_distribution(service) -> None:
    client = service.openai()

    def scored(adaptation: object) -> list[float]:
        answer = client.completions.create(
            model=service.model, prompt=BANKING, max_tokens=0, echo=True, logprobs=0,
            extra_body={"adaptation": adaptation},
        )  # fmt: skip
        return answer.choices[0].logprobs.token_logprobs[1:]

    assert scored("off") == scored("off")
    assert scored("off") != scored("auto")
    assert scored(0) != scored(1)


def test_echo_scores_a_text(service) -> None:
    answer = service.openai().completions.create(
        model=service.model, prompt=[BANKING, "2 + 2 = 4"], max_tokens=0, echo=True, logprobs=1
    )
    first = answer.choices[0]
    assert first.text == BANKING == "".join(first.logprobs.tokens)
    assert first.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in first.logprobs.token_logprobs[1:])
    assert answer.usage.completion_tokens == 0
    assert len(answer.choices) == 2


def test_n_stop_and_logprobs(service) -> None:
    stop = ["er", "in", "on", "th"]  # no English of 40 tokens is without all of them
    answer = service.openai().chat.completions.create(
        model=service.model, messages=chat("Count from one to ten in words."), n=3, seed=5,
        max_tokens=40, stop=stop, logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert "stop" in {choice.finish_reason for choice in answer.choices}
    for choice in answer.choices:
        assert not any(one in choice.message.content for one in stop)
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    assert len({choice.message.content for choice in answer.choices}) > 1


async def test_seeded_answers_do_not_depend_on_company(service) -> None:
    client = service.async_openai()

    async def ask(text: str, seed: int) -> str:
        answer = await client.completions.create(
            model=service.model, prompt=text, max_tokens=16, temperature=1.0, seed=seed
        )
        return answer.choices[0].text

    texts = [BANKING, "SELECT name FROM", "def main():", "In the beginning", "Add the flour and"]
    alone = [await ask(text, seed) for seed, text in enumerate(texts)]
    crowd = await asyncio.gather(
        *(ask(text, seed) for _ in range(4) for seed, text in enumerate(texts))
    )
    assert crowd == alone * 4
    assert await ask("In the beginning", 99) != alone[3]


def test_clusters_and_their_adapters(service) -> None:
    clusters = httpx.get(f"{service.url}/v1/clusters").json()["data"]
    assert len(clusters) > 8
    one = httpx.get(f"{service.url}/v1/clusters/{clusters[0]['id']}").json()
    assert one == clusters[0]
    assert one["size"] > 0 and one["characteristic_tokens"]
    answer = httpx.get(f"{service.url}/v1/clusters/{one['id']}/adapter", timeout=60)
    assert answer.headers["content-type"] == "application/zip"
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    config = json.loads(archive.read("adapter_config.json"))
    assert config["peft_type"] == "LORA"
    with pytest.raises(KeyError):
        httpx.get(f"{service.url}/v1/clusters/999999").json()["id"]


def test_assign_tells_what_generate_would_use(service) -> None:
    answer = httpx.post(f"{service.url}/v1/assign", json={"prompt": BANKING}).json()
    used = service.openai().completions.create(model=service.model, prompt=BANKING, max_tokens=1)
    assert answer["adaptation"] == used.adaptation


def test_client_errors_are_the_clients(service) -> None:
    client = service.openai()
    with pytest.raises(NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(BadRequestError, match="2048"):
        client.completions.create(model=service.model, prompt="word " * 3000)
    with pytest.raises(BadRequestError, match="Unrecognized request argument"):
        client.completions.create(model=service.model, prompt="x", extra_body={"colour": "red"})


async def test_a_client_that_leaves_frees_its_place(service) -> None:
    client = service.async_openai()
    before = await service.generated_once_idle()
    for _ in range(40):  # more than the engine runs at one time
        stream = await client.completions.create(
            model=service.model, prompt=BANKING, max_tokens=1500, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        await anext(aiter(stream))
        await stream.close()
    generated = await service.generated_once_idle() - before
    assert 40 <= generated < 40 * 1500 / 2, "they should not have run to their ends"
    async with asyncio.timeout(30):
        answer = await client.completions.create(model=service.model, prompt="Hello", max_tokens=2)
    assert answer.usage.completion_tokens > 0
