"""Renders a chat template: a program of its own, since a template may come from anybody.

Jinja's sandbox keeps a template from Python's objects. It bounds neither the time nor the memory of
one that only computes, so that this process does: it limits itself, reads one JSON document from
standard input, and writes one to standard output. It imports nothing of moejax.
"""

import datetime
import json
import sys
from typing import Any, NoReturn

MAX_CHARACTERS = 2**22
MAX_SECONDS = 10
MAX_MEMORY = 2**30
SHOWN_CHARACTERS = 300


class RefusalError(Exception):
    """A template's own `raise_exception`."""


def limit() -> None:
    """Bounds the time and the memory of this process, where the system can."""
    try:
        import resource
    except ImportError:  # not on Windows, where only the caller's clock bounds the time
        return
    wanted = {
        "RLIMIT_CPU": MAX_SECONDS,
        "RLIMIT_AS": MAX_MEMORY,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
    }
    for name, value in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):  # a lower limit is set, or there is none
            continue


def environment() -> Any:
    """Returns Jinja with what chat templates expect."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks what the model wrote, which makes no difference to the text."""

        def __init__(self, environment: Any):
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            """Returns what is between the marks."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    jinja.filters["tojson"] = to_json
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = strftime_now
    return jinja


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Returns JSON as it is, where Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def raise_exception(message: Any) -> NoReturn:
    """Refuses the messages."""
    raise RefusalError(str(message))


def strftime_now(format: str) -> str:
    """Returns the local date and time."""
    return datetime.datetime.now().strftime(format)


def render(source: str, variables: dict[str, Any]) -> str:
    """Returns the text of a template.

    Raises:
      OverflowError: it has more than `MAX_CHARACTERS`.
    """
    template = environment().from_string(source)
    parts = []
    length = 0
    for part in template.generate(**variables):
        length += len(part)
        if length > MAX_CHARACTERS:
            raise OverflowError(f"it writes more than {MAX_CHARACTERS} characters")
        parts.append(part)
    return "".join(parts)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Returns the text, or the kind of an error and its message."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import SecurityError

    try:
        return {"text": render(request["source"], request["variables"])}
    except RefusalError as error:
        return {"error": "refusal", "message": shown(error)}
    except SecurityError as error:
        return {"error": "security", "message": shown(error)}
    except TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {shown(error)}"}
    except (OverflowError, MemoryError, RecursionError) as error:
        return {"error": "limit", "message": shown(error)}
    except Exception as error:  # a template may raise anything
        return {"error": "other", "message": shown(error)}


def shown(error: BaseException) -> str:
    """Returns the message of an error in one line, or its type if it has none."""
    text = " ".join(str(error).split())[:SHOWN_CHARACTERS]
    return text or type(error).__name__


def main() -> None:
    """Answers one request."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    limit()
    json.dump(answer(request), sys.stdout)


if __name__ == "__main__":
    main()
