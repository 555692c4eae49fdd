"""Inputs that no well-meaning client sends, and some that it does."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

MODEL = "tiny"
JSON = (("content-type", "application/json"),)
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": MODEL, "prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 2,
    },
    "/v1/assign": {"prompt": "x"},
}
FIELDS = [
    "model",
    "prompt",
    "messages",
    "stream",
    "stream_options",
    "n",
    "temperature",
    "top_p",
    "presence_penalty",
    "logit_bias",
    "frequency_penalty",
    "stop",
    "seed",
    "user",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "echo",
    "stop_token_ids",
    "adaptation",
    "namespace",
    "learn",
    "timeout_s",
    "max_tokens",
    "logprobs",
    "best_of",
    "suffix",
    "max_completion_tokens",
    "top_logprobs",
    "metadata",
    "tools",
    "tool_choice",
    "response_format",
    "store",
    "service_tier",
    "reasoning_effort",
    "colour",
]
NAMES = [
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "/etc/passwd",
    "C:\\windows",
    "file:///etc/passwd",
    "%00",
    ".",
    "..",
    "-1",
    "0",
    "1e9",
    "99999999999999999999",
    "'",
    '"',
    "<script>",
    "${jndi:ldap://x}",
    "é漢😀",
    "a%20b",
]
TEXTS = [
    "",
    " ",
    "x" * 5000,
    "\x00",
    "\u202e\u2066",
    "\ufeff",
    "\U0010ffff",
    "e\u0301" * 50,
    "👩‍👩‍👧‍👦" * 30,
    "<s></s><|im_start|>system",
    "%s%n{}{0}",
    "\r\nX-Header: 1",
    "'; DROP TABLE clusters; --",
    *NAMES,
]
NUMBERS = [0, 1, -1, 2, 64, 10**6, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324]


@dataclass(frozen=True)
class Input:
    """One HTTP request. With several parts the body comes in chunks."""

    method: str
    path: str
    parts: tuple[bytes, ...] = ()
    headers: tuple[tuple[str, str], ...] = JSON
    kind: str = field(default="", compare=False)


class Inputs:
    """An endless stream of inputs, the same for one seed."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._kinds: list[Callable[[], Input]] = [
            self._odd_fields,
            self._odd_fields,
            self._odd_messages,
            self._raw_numbers,
            self._nested,
            self._damaged,
            self._bytes,
            self._content_type,
            self._chunked,
            self._path,
        ]

    def __iter__(self) -> Iterator[Input]:
        while True:
            yield self._draw.choice(self._kinds)()

    def _value(self, depth: int = 0) -> Any:
        draw = self._draw
        kind = draw.randrange(9 if depth < 3 else 6)
        if kind < 2:
            return draw.choice(NUMBERS)
        if kind == 2:
            return draw.choice([None, True, False])
        if kind == 3:
            return draw.choice(TEXTS)
        if kind == 4:
            return draw.choice(["auto", "off", "user", "text", "json_object", MODEL, "x"])
        if kind == 5:
            return draw.uniform(-3, 3)
        inner = [self._value(depth + 1) for _ in range(draw.randrange(4))]
        if kind < 8:
            return inner
        return {draw.choice([*FIELDS, *TEXTS[:8]]): one for one in inner}

    def _good(self) -> tuple[str, dict[str, Any]]:
        path = self._draw.choice(sorted(GOOD))
        return path, dict(GOOD[path])

    def _posted(self, kind: str, path: str, body: object) -> Input:
        return Input("POST", path, (json.dumps(body).encode(),), JSON, kind)

    def _odd_fields(self) -> Input:
        path, body = self._good()
        for _ in range(self._draw.randrange(1, 4)):
            body[self._draw.choice(FIELDS)] = self._value()
        return self._posted("odd fields", path, body)

    def _odd_messages(self) -> Input:
        names = ["role", "content", "name", "type", "text", "tool_calls", "colour"]
        turns = [
            {self._draw.choice(names): self._value() for _ in range(self._draw.randrange(4))}
            for _ in range(self._draw.randrange(3))
        ]
        if self._draw.random() < 0.5:
            turns = [{"role": "user", "content": self._value()}]
        body = GOOD["/v1/chat/completions"] | {"messages": turns}
        return self._posted("odd messages", "/v1/chat/completions", body)

    def _raw_numbers(self) -> Input:
        """Numbers that Python's JSON writer would not write."""
        path, body = self._good()
        raw = self._draw.choice(
            ["NaN", "-Infinity", "1e999", "9" * 5000, "0x10", "01", "1.", "-", "1e-999", "+1"]
        )
        name = self._draw.choice(FIELDS)
        text = json.dumps(body | {name: "@"}).replace('"@"', raw)
        return Input("POST", path, (text.encode(),), JSON, "raw numbers")

    def _nested(self) -> Input:
        path, body = self._good()
        depth = self._draw.choice([50, 2000, 20_000])
        opening, closing = self._draw.choice([("[", "]"), ('{"a":', "}")])
        nested = opening * depth + "1" + closing * depth
        name = self._draw.choice(FIELDS)
        text = json.dumps(body | {name: "@"}).replace('"@"', nested)
        return Input("POST", path, (text.encode(),), JSON, "deep nesting")

    def _damaged(self) -> Input:
        """A good body, cut or with some bytes replaced; or with a key twice."""
        path, body = self._good()
        content = bytearray(json.dumps(body).encode())
        if self._draw.random() < 0.3:
            del content[self._draw.randrange(len(content)) :]
        for _ in range(self._draw.randrange(3)):
            if content:
                content[self._draw.randrange(len(content))] = self._draw.randrange(256)
        if self._draw.random() < 0.2:
            content[:1] = b'{"max_tokens": "x", '
        return Input("POST", path, (bytes(content),), JSON, "damaged")

    def _bytes(self) -> Input:
        path, _ = self._good()
        content = self._draw.randbytes(self._draw.randrange(200))
        return Input("POST", path, (content,), JSON, "bytes")

    def _content_type(self) -> Input:
        path, body = self._good()
        told = self._draw.choice(
            [
                "text/plain",
                "application/x-www-form-urlencoded",
                "multipart/form-data; boundary=x",
                "application/json; charset=utf-16",
                "application/xml",
                "",
                "a/b/c",
                "application/octet-stream",
            ]
        )
        headers = (("content-type", told),) if told else ()
        if self._draw.random() < 0.3:
            headers += (("content-encoding", "gzip"),)
        return Input("POST", path, (json.dumps(body).encode(),), headers, "content type")

    def _chunked(self) -> Input:
        """A body in pieces, with a length that may be a lie."""
        path, body = self._good()
        content = json.dumps(body | {self._draw.choice(FIELDS): self._value()}).encode()
        cuts = sorted(self._draw.randrange(len(content)) for _ in range(self._draw.randrange(1, 9)))
        ends = [*cuts, len(content)]
        parts = tuple(content[i:j] for i, j in zip([0, *cuts], ends, strict=True))
        headers = JSON
        if self._draw.random() < 0.3:
            lie = self._draw.choice(["0", "-1", "99999999999", "x", "²", "1,2"])
            headers += (("content-length", lie),)
        return Input("POST", path, parts, headers, "chunked")

    def _path(self) -> Input:
        draw = self._draw
        name = draw.choice(NAMES)
        path = draw.choice(
            [
                f"/v1/clusters/{name}",
                f"/v1/clusters/{name}/adapter",
                f"/v1/models/{name}",
                f"/v1/clusters?namespace={name}",
                f"/{name}",
                f"/v1/{name}",
                "/v1/completions/",
                "//v1//completions",
                "/v1/clusters/0/adapter?namespace=" + "".join(draw.choices(string.printable, k=9)),
            ]
        )
        method = draw.choice(["GET", "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
        return Input(method, path, (), (), "path")
