"""`chameleon chat`: a conversation with a running service, and what adapts each answer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster_router.wire.errors import ChameleonError, RequestError
from deploy.cli.service import LOCAL, Key, Service, Tenant, Url

HELP = """\
/adaptation auto | off | ID   what adapts the answers from now on
/history                      the conversation so far
/clear                        begin anew
/help                         this
/quit                         end, as Ctrl-D does; Ctrl-C ends an answer"""


@dataclass
class Conversation:
    """Messages so far and how answers are asked for.

    `adaptation` is `auto`, `off` or a cluster's id; `fields` are further fields of requests.
    """

    service: Service
    model: str
    adaptation: str | int = "auto"
    fields: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str, shown: Callable[[str], None]) -> dict[str, Any]:
        """Send `text`, show the answer as it comes, and tell what adapted it.

        An answer that Ctrl-C cuts off is kept as far as it came; a message that failed is not.

        Raises:
            ChameleonError: the service refused or failed.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": asked, "stream": True} | self.fields
        parts: list[str] = []
        adaptation: dict[str, Any] = {}
        with contextlib.suppress(KeyboardInterrupt):
            events = self.service.stream(
                "/v1/chat/completions", body | {"adaptation": self.adaptation}
            )
            with contextlib.closing(events):
                for event in events:
                    adaptation = event.get("adaptation") or adaptation
                    for choice in event["choices"]:
                        if part := choice["delta"].get("content"):
                            parts.append(part)
                            shown(part)
        self.messages = [*asked, {"role": "assistant", "content": "".join(parts)}]
        return adaptation


def chat(
    message: Annotated[
        str | None, typer.Argument(help="Say this alone; without it what is typed or piped in.")
    ] = None,
    url: Url = LOCAL,
    key: Key = None,
    adaptation: Annotated[str, typer.Option(help="auto, off, or the id of a cluster.")] = "auto",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    namespace: Tenant = None,
    no_learn: Annotated[
        bool, typer.Option("--no-learn", help="Keep what is said out of all statistics.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Do not tell what adapted the answer.")
    ] = False,
) -> None:
    """Talk to a running service; each answer says which cluster adapted it.

    In a pipe, all of standard input is one message and the answer alone goes to standard output.
    """
    service = Service(url, key)
    chosen = parse_adaptation(adaptation)
    fields = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "namespace": namespace,
        "learn": False if no_learn else None,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    talk = Conversation(service, service.model(), chosen, given)
    if system:
        talk.messages.append({"role": "system", "content": system})
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
        if not message:
            raise RequestError("nothing came in; give a message, or pipe one in")
    if message is not None:
        _answer(talk, message, Console(stderr=True, highlight=False), quiet)
        return
    _converse(talk, quiet)


def parse_adaptation(text: str) -> str | int:
    """`auto`, `off` or the id of a cluster.

    Raises:
        RequestError: it is none of them.
    """
    if text in {"auto", "off"}:
        return text
    if text.isdecimal():
        return int(text)
    raise RequestError(f"adaptation is auto, off or the id of a cluster, not {text!r}")


def describe(adaptation: dict[str, Any]) -> str:
    """What adapted an answer, in words."""
    mode = adaptation.get("mode")
    similarity = adaptation.get("similarity")
    near = "" if similarity is None else f", similarity {similarity:.3f}"
    if mode == "cluster":
        late = "; its update was late, the shared one stood in" if adaptation["fallback"] else ""
        return f"cluster {adaptation['cluster']}{near}{late}"
    if mode == "static":
        return f"no cluster{near}: the update that all share"
    return "unadapted" if mode == "off" else "no answer"


def _answer(talk: Conversation, text: str, told: Console, quiet: bool) -> None:
    def shown(part: str) -> None:
        sys.stdout.write(part)
        sys.stdout.flush()

    adaptation = talk.say(text, shown)
    sys.stdout.write("\n")
    if not quiet:
        told.print(f"[{describe(adaptation)}]", style="dim", markup=False)


def _converse(talk: Conversation, quiet: bool) -> None:
    """Read, answer, until the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited and recalled)
    console = Console(highlight=False)
    console.print(f"{talk.model} at {talk.service.url}; /help lists what else can be said")
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D ends", style="dim")
            continue
        if line in {"/quit", "/exit"}:
            return
        try:
            if line.startswith("/"):
                console.print(obey(talk, line), markup=False)
            elif line:
                _answer(talk, line, console, quiet)
        except ChameleonError as error:
            console.print(f"error: {error}", style="red", markup=False)


def obey(talk: Conversation, line: str) -> str:
    """Do what a line that begins with a slash says; what to show.

    Raises:
        RequestError: there is no such command, or its argument is wrong.
    """
    command, _, argument = line.partition(" ")
    if command == "/help":
        return HELP
    if command == "/clear":
        talk.messages = [one for one in talk.messages if one["role"] == "system"]
        return "begun anew"
    if command == "/history":
        said = [f"{one['role']}: {one['content']}" for one in talk.messages]
        return "\n".join(said) or "nothing has been said"
    if command == "/adaptation":
        if argument:
            talk.adaptation = parse_adaptation(argument.strip())
        return f"adaptation: {talk.adaptation}"
    raise RequestError(f"there is no {command}; /help lists what there is")
