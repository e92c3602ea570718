"""Chats as text: the template that comes with a model, rendered apart from everything else."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.data.tokenizers.beside import (
    NAMES_FILES,
    REMEDY,
    SETTINGS_FILE,
    read_bounded,
    read_json,
    text_of,
)
from moejax.interop.hf.errors import HfError

TEMPLATE_FILE = "chat_template.jinja"
RENDERER = Path(__file__).with_name("render.py")

MAX_TEMPLATE = 2**20
"""Characters; those that are published have a few thousand."""

MAX_WAIT_S = 30.0
"""Seconds on the clock; `render.MAX_SECONDS` are those of the processor."""

MEANINGS = {
    "refusal": "refuses these messages: {}; change them",
    "security": f"tries to leave its sandbox ({{}}); {REMEDY}",
    "syntax": f"is damaged: {{}}; {REMEDY}",
    "limit": f"takes too much memory ({{}}); {REMEDY}",
    "other": "cannot write these messages: {}; change them, such as their roles or their contents",
}


class ChatTemplate:
    """The template of a model's chats."""

    def __init__(self, source: str, tokens: Mapping[str, str], where: str):
        """Keeps a template, which is neither read nor run before it is needed.

        Args:
          source: in Jinja's language.
          tokens: texts of special tokens, by `bos_token` and others.
          where: what errors call it.

        Raises:
          HfError: it is too long for one.
        """
        if len(source) > MAX_TEMPLATE:
            raise HfError(
                f"{where}: the chat template has more than {MAX_TEMPLATE} characters; {REMEDY}"
            )
        self._source = source
        self._tokens = dict(tokens)
        self._where = where

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Returns a chat as text with special tokens.

        Args:
          messages: such as `{"role": "user", "content": "Hello"}`, in order.
          add_generation_prompt: whether the beginning of the model's answer follows.
          **variables: what else the template reads, such as `tools`.

        Raises:
          HfError: the template refuses the messages, is damaged, tries to leave its sandbox, or
            takes too much time or memory.
        """
        given = {
            **self._tokens,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        modules = [path for path in sys.path if path]  # not the current folder
        request = {"source": self._source, "variables": given, "path": modules}
        try:
            text = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise HfError(f"the messages of a chat must be plain data: {error}") from error
        answer = self._ask(text)
        if "text" in answer:
            return answer["text"]
        meaning = MEANINGS[answer["error"]].format(answer["message"])
        raise HfError(f"{self._where}: the chat template {meaning}")

    def _ask(self, request: str) -> dict[str, str]:
        """Returns what the renderer answers."""
        # -I and -S: neither the folder it runs in nor the environment can add modules.
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(RENDERER)]
        try:
            done = subprocess.run(
                command,
                input=request,
                capture_output=True,
                encoding="utf-8",
                timeout=MAX_WAIT_S,
                env={},
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise self._endless() from error
        if done.returncode == 0:
            return json.loads(done.stdout)
        if done.returncode < 0:  # by a signal: its time or its memory was over
            raise self._endless()
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        raise HfError(f"{self._where}: the chat template cannot be rendered ({lines[-1]})")

    def _endless(self) -> HfError:
        return HfError(
            f"{self._where}: the chat template does not end, or takes too much time or memory; "
            f"{REMEDY}"
        )


def read_chat(folder: Path) -> ChatTemplate | None:
    """Returns the chat template in a folder; None if the model has none.

    Raises:
      HfError, DataError: it, or what names special tokens, is damaged.
    """
    tokens = _tokens(folder)
    path = folder / TEMPLATE_FILE
    if path.exists():
        try:
            source = read_bounded(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise HfError(f"{path} is damaged: {error}; {REMEDY}") from error
        return ChatTemplate(source, tokens, str(path))
    path = folder / SETTINGS_FILE
    default = _default(path, read_json(path).get("chat_template"))
    return None if default is None else ChatTemplate(default, tokens, str(path))


def _default(path: Path, given: Any) -> str | None:
    """Returns the template of a setting: text, or a list of which one is called `default`."""
    if given is None or isinstance(given, str):
        return given
    entries = given if isinstance(given, list) else []
    named = {
        entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, Mapping)
    }
    if isinstance(named.get("default"), str):
        return named["default"]
    raise HfError(
        f"{path}: chat_template must be text, or a list with one that is named 'default'; {REMEDY}"
    )


def _tokens(folder: Path) -> dict[str, str]:
    """Returns the texts of all special tokens that have a name."""
    tokens = {}
    for file in NAMES_FILES:
        path = folder / file
        for key, value in read_json(path).items():
            # `add_bos_token` and the like are flags.
            if key.endswith("_token") and not isinstance(value, bool):
                text = text_of(path, key, value)
                tokens[key] = text or ""
    return tokens
