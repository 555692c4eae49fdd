"""The pages under docs/reference that are made from the code:  python docs/generate.py

Each says so on top; a test compares them with what this script would write.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import griffe
import typer
from pydantic import BaseModel
from typer.cli import get_docs_for_click

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from adapter_gen.hypernetwork import MemoryConfig  # noqa: E402
from cluster_router.wire import errors  # noqa: E402
from deploy.cli import app  # noqa: E402
from deploy.cli.openapi import schema  # noqa: E402
from deploy.config import AppConfig  # noqa: E402
from deploy.metrics import METRICS  # noqa: E402
from lm_workers.vllm.config import VllmConfig  # noqa: E402
from training.config import TrainSettings  # noqa: E402
from training.evaluation.settings import EvaluateSettings  # noqa: E402

Schema = Mapping[str, Any]

_MADE = "<!-- Made by docs/generate.py from {source}; edit that and run it again. -->\n\n"
_BOUNDS = {
    "exclusiveMinimum": "> {}",
    "minimum": ">= {}",
    "exclusiveMaximum": "< {}",
    "maximum": "<= {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}
_PYTHON = {
    "Connecting": ("deploy.client", ["connect", "connect_sync"]),
    "Clients": ("cluster_router.client", ["Options", "ChameleonClient", "SyncChameleonClient"]),
    "Requests": (
        "cluster_router.wire.types",
        ["GenerateRequest", "SamplingParams", "Message"],
    ),
    "Answers": (
        "cluster_router.wire.types",
        ["GenerateResult", "TokenChunk", "TokenLogprob", "Adaptation", "Assignment", "ClusterInfo"],
    ),
}


def pages() -> dict[str, str]:
    """Content of each page by file name."""
    return {name: re.sub(r"\n{3,}", "\n\n", text) for name, text in _pages().items()}


def _pages() -> dict[str, str]:
    api = schema()
    return {
        "settings.md": settings_page(
            "Settings",
            "`args:` of an application in the config file: `AppConfig` of `deploy/config.py`. A "
            "setting that does not exist, or is out of range, stops the start with a message that "
            "names it. How many replicas of each part, and on what, is Serve's own [`deployments:` "
            "section](../guides/operation.md#scaling).",
            "deploy/config.py",
            AppConfig(),
        )
        + "".join(_sections(VllmConfig(), "engine, backend vllm")),
        "training.md": settings_page(
            "Training settings",
            "The file in `chameleon train --config`: `TrainSettings` of "
            "`training/config.py`. `training/configs/` has whole ones.",
            "training/config.py",
            TrainSettings(),
        )
        + "".join(_sections(MemoryConfig(), "hypernetwork, kind memory")),
        "evaluation.md": settings_page(
            "Evaluation settings",
            "The file in `chameleon evaluate --settings`: `EvaluateSettings` of "
            "`training/evaluation/settings.py`.",
            "training/evaluation/settings.py",
            EvaluateSettings(),
        ),
        "http.md": http_page(api),
        "errors.md": errors_page(),
        "metrics.md": metrics_page(),
        "python.md": python_page(),
        "cli.md": cli_page(),
        "openapi.json": json.dumps(api, indent=2, ensure_ascii=False) + "\n",
    }


def cli_page() -> str:
    """Every command of `chameleon` with its options, as its --help has them."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="chameleon")
    text = get_docs_for_click(obj=command, ctx=context, name="chameleon", title="Command line")
    return _MADE.format(source="deploy/cli and training/cli.py") + text.strip() + "\n"


def settings_page(title: str, intro: str, source: str, defaults: BaseModel) -> str:
    """Every setting below `defaults`, a section for each part."""
    head = _MADE.format(source=source) + f"# {title}\n\n{intro}\n\n"
    return head + "".join(_sections(defaults, ""))


def _sections(model: BaseModel, path: str) -> Iterator[str]:
    kind = type(model)
    summary, _ = docstring(kind)
    described: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        described |= docstring(parent)[1]
    schema = kind.model_json_schema()
    if path:
        yield f"## `{path}` {{ #{_anchor(path)} }}\n\n"
    yield f"{summary}\n\n| setting | type | default | meaning |\n|---|---|---|---|\n"
    parts = []
    for name in kind.model_fields:
        value = getattr(model, name)
        where = f"{path}.{name}" if path else name
        if name not in described:
            raise LookupError(f"{kind.__name__}.{name} has no line under Attributes")
        default, shape = _code(value), _shape(schema["properties"][name], schema.get("$defs", {}))
        if isinstance(value, BaseModel):
            parts.append((where, value))
            default, shape = "", f"[section](#{_anchor(where)})"
        yield f"| `{name}` | {shape} | {default} | {_null(_cell(described[name]))} |\n"
    yield "\n"
    for where, value in parts:
        yield from _sections(value, where)


def _anchor(path: str) -> str:
    return re.sub(r"[^a-z_]+", "-", path)


def docstring(kind: type) -> tuple[str, dict[str, str]]:
    """Text of a class's docstring, and its attributes' descriptions."""
    text, described = [], {}
    value = griffe.Docstring(kind.__dict__.get("__doc__") or "", lineno=1)
    for section in griffe.parse_google(value):
        if section.kind is griffe.DocstringSectionKind.attributes:
            for one in section.value:
                described |= {name.strip(): one.description for name in one.name.split(",")}
        elif section.kind is griffe.DocstringSectionKind.text:
            text.append(section.value)
    return "\n\n".join(text), described


def _shape(schema: Schema, defs: Mapping[str, Schema]) -> str:
    """Type and range in words."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return _shape(defs[name], defs) if "enum" in defs.get(name, {}) else f"`{name}`"
    if "enum" in schema:
        return ", ".join(_code(value) for value in schema["enum"])
    if "const" in schema:
        return _code(schema["const"])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(_shape(one, defs) for one in schema[union]))
    bounds = [
        text.format(_number(schema[key]))
        for key, text in _BOUNDS.items()
        if key in schema and not (key.startswith("min") and schema[key] == 1 and key != "minimum")
    ]
    kind = str(schema.get("type", "any"))
    if kind == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})]
        kind = "list of " + ", ".join(dict.fromkeys(_shape(one, defs) for one in items))
        bounds = [] if "prefixItems" in schema else bounds
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        kind = f"map to {_shape(schema['additionalProperties'], defs)}"
    kind = schema.get("format", kind) if schema.get("format") == "path" else kind
    return f"{kind} {', '.join(bounds)}".rstrip()


def _number(value: float) -> str:
    """Whole numbers in full."""
    return str(int(value)) if value == int(value) else f"{value:g}"


def _code(value: object) -> str:
    if isinstance(value, BaseModel):
        return ""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(str(one) for one in value)}]`"
    return f"`{value}`" if value != "" else '`""`'


def _null(text: str) -> str:
    """None as YAML writes it."""
    return re.sub(r"\bNone\b", "`null`", text)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def http_page(openapi: Schema) -> str:
    """Endpoints, what they take and what they answer."""
    schemas = openapi["components"]["schemas"]
    lines = [
        _MADE.format(source="the OpenAPI schema, cluster_router/openai"),
        "# HTTP API\n\nOpenAI's endpoints take OpenAI's fields, and what is marked *Extension*. A "
        "field that does not exist is refused, never ignored; one with a star is required. Every "
        "answer carries `x-request-id`. The same as a schema is [a file](openapi.json) and served "
        "at `/openapi.json`; to try it out there is `/docs`.\n",
    ]
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            lines.append(f"\n## {method.upper()} `{path}`\n\n{operation['summary']}.\n")
            lines += _operation(operation, schemas)
    answers = sorted(name for name in schemas if not name.endswith("Request"))
    lines.append("\n## Shapes\n")
    for name in answers:
        lines.append(f"\n### {name}\n\n{schemas[name].get('description', '')}\n")
        lines += _fields(schemas[name], schemas)
    return "\n".join(lines) + "\n"


def _operation(operation: Schema, schemas: Mapping[str, Schema]) -> Iterator[str]:
    if parameters := operation.get("parameters"):
        yield "| parameter | in | type | meaning |\n|---|---|---|---|"
        for one in parameters:
            shape = _shape(one["schema"], schemas)
            yield f"| `{one['name']}` | {one['in']} | {shape} | {one.get('description', '')} |"
        yield ""
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body:
        name = body["schema"]["$ref"].rsplit("/", 1)[1]
        yield from _fields(schemas[name], schemas)
    for media, content in operation["responses"]["200"].get("content", {}).items():
        shape = _shape(content["schema"], schemas)
        name = shape.strip("`")
        link = f"[{name}](#{name.lower()})" if name in schemas else shape
        streamed = media == "text/event-stream"
        yield f"With `stream`: `{media}`.\n" if streamed else f"Answers `{media}`: {link}.\n"


def _fields(schema: Schema, schemas: Mapping[str, Schema]) -> Iterator[str]:
    if "properties" not in schema:
        return
    required = schema.get("required", [])
    yield "| field | type | meaning |\n|---|---|---|"
    for name, one in schema["properties"].items():
        mark = " *" if name in required else ""
        yield f"| `{name}`{mark} | {_shape(one, schemas)} | {one.get('description', '')} |"
    yield ""


def metrics_page() -> str:
    """Every metric, a section for each deployment."""
    text = _MADE.format(source="deploy/metrics.py") + (
        "# Metrics\n\nAs Prometheus scrapes them; [Monitoring](../guides/monitoring.md) says from "
        "where. Each also has the labels `application`, `deployment` and `replica`. A histogram "
        "comes as `_bucket`, `_sum` and `_count`.\n\n"
    )
    for owner in dict.fromkeys(metric.owner for metric in METRICS):
        text += (
            f"## {owner}\n\n| metric | type | labels | unit | meaning |\n|---|---|---|---|---|\n"
        )
        for metric in (one for one in METRICS if one.owner == owner):
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            cells = (f"`{metric.exported}`", metric.kind, labels, metric.unit, _cell(metric.help))
            text += "| " + " | ".join(cells) + " |\n"
        text += "\n"
    return text


def errors_page() -> str:
    """The tree of errors."""
    lines = [
        _MADE.format(source="cluster_router/wire/errors.py"),
        '# Errors\n\nOver HTTP an error is OpenAI\'s JSON, `{"error": {"message", "type", '
        '"param", "code"}}`; `message` says what to change, `param` names the field. A 429 carries '
        "`Retry-After`. Python clients raise the class itself. A failure that nobody foresaw is "
        "500 `internal_error`; the service's log names its request id, and the caller is told no "
        "more.\n",
        "| class | status | type | code | when |\n|---|---|---|---|---|",
    ]
    for kind in _tree(errors.ChameleonError):
        if issubclass(kind, errors.SetupError):
            continue
        summary, _ = docstring(kind)
        code = f"`{kind.code}`" if kind.code else ""
        lines.append(
            f"| `{kind.__name__}` | {kind.status} | `{kind.kind}` | {code} | {_cell(summary)} |"
        )
    lines.append(
        "\n## For the operator\n\nRaised at start-up or logged, never sent to a caller.\n\n"
        "| class | when |\n|---|---|"
    )
    for kind in _tree(errors.SetupError):
        lines.append(f"| `{kind.__name__}` | {_cell(docstring(kind)[0])} |")
    return "\n".join(lines) + "\n"


def _tree(kind: type[errors.ChameleonError]) -> Iterator[type[errors.ChameleonError]]:
    if kind is not errors.ChameleonError:
        yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


def python_page() -> str:
    """Signatures and docstrings of what callers use."""
    modules = dict.fromkeys(module for module, _ in _PYTHON.values())
    lines = [
        _MADE.format(source=", ".join(modules)),
        "# Python API\n\nWhat a process on the service's Ray cluster uses; see [Python "
        "handles](../guides/python.md).\n",
    ]
    for title, (module, names) in _PYTHON.items():
        loaded = griffe.load(module, search_paths=[ROOT])
        lines.append(f"\n## {title}\n\nFrom `{module}`.\n")
        for name in names:
            lines += _member(loaded[name], "###")
            if loaded[name].is_class:
                for child in loaded[name].functions.values():
                    if not child.name.startswith("_"):
                        lines += _member(child, "####")
    return "\n".join(lines) + "\n"


def _member(member: Any, level: str) -> Iterator[str]:
    yield f"\n{level} `{member.name}`\n"
    if member.is_function:
        yield _fenced(_signature(member))
    elif fields := [one for one in member.attributes.values() if one.annotation is not None]:
        lines = [
            f"{one.name}: {one.annotation}" + (f" = {one.value}" if one.value is not None else "")
            for one in fields
            if not one.name.startswith("_")
        ]
        yield _fenced("\n".join(lines))
    if member.docstring is not None:
        yield _prose(member.docstring.value) + "\n"


def _fenced(code: str) -> str:
    """Griffe writes 'a' where ruff writes "a"."""
    return "```python\n" + code.replace("'", '"') + "\n```\n"


def _signature(function: Any) -> str:
    kinds = griffe.ParameterKind
    parts, starred = [], False
    for one in function.parameters:
        if one.name in ("self", "cls"):
            continue
        if one.kind is kinds.keyword_only and not starred:
            parts.append("*")
            starred = True
        stars = "**" if one.kind is kinds.var_keyword else ""
        text = f"{stars}{one.name.lstrip('*')}: {one.annotation}"
        parts.append(text if one.default is None or stars else f"{text} = {one.default}")
    inside = "".join(f"\n    {part}," for part in parts)
    keyword = "async def" if "async" in function.labels else "def"
    if "classmethod" in function.labels:
        keyword = f"@classmethod\n{keyword}"
    return f"{keyword} {function.name}({inside}\n) -> {function.returns}"


def _prose(text: str) -> str:
    """A docstring as Markdown: its sections' entries as list items."""
    text = re.sub(r"^(Args|Attributes|Raises|Returns):$", r"\n*\1*\n", text, flags=re.MULTILINE)
    return re.sub(r"^    (\S[^\n]*(?:\n     +\S[^\n]*)*)", _item, text, flags=re.MULTILINE)


def _item(match: re.Match[str]) -> str:
    return "- " + " ".join(match[1].split())


def main() -> None:
    """Write the pages."""
    folder = ROOT / "docs/reference"
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
