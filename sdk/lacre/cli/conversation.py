"""The conversation of `lacre chat` at a terminal: input, output, and history.

Everything that a person types is a prompt, and Lacre keeps prompts secret. So nothing of it is written to a disk, except to a
file that the person names, which only its owner can read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from lacre.chat.stream_sync import ChatStream
from lacre.cli import lock
from lacre.cli.output import err, out, printable, tell, waiting
from lacre.cli.render import PlainOutput, Rendered, Throughput, show
from lacre.client import Client
from lacre.errors import LacreError, SettingsError
from lacre.runtime import private_files

HELP: Final = """\
Enter sends. Alt-Enter or Ctrl-J begins a new line; pasted text keeps its lines. Up and down go through the history.
Ctrl-C stops an answer, Ctrl-D ends the chat.

/clear         forget the conversation
/system TEXT   start again with a system message
/save FILE     save the conversation in a private file
/lock          all checks
/help          this
/quit          end the chat"""

COMMANDS: Final = ("/clear", "/system", "/save", "/lock", "/help", "/quit")


class Conversation:
    """turns: earlier turns, such as a system message. params: of each request."""

    def __init__(
        self,
        client: Client,
        turns: list[dict[str, str]],
        params: dict[str, Any],
        *,
        rendered: bool = True,
        history: Path | None = None,
    ) -> None:
        self._client = client
        self._turns = turns
        self._params = params
        self._display: Callable[[], PlainOutput | Rendered] = lambda: Rendered(out()) if rendered else PlainOutput()
        self._prompt: PromptSession[str] = PromptSession(
            history=_history(history),
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation="  ",
            bottom_toolbar=lambda: lock.line(client.verification),
            completer=WordCompleter(list(COMMANDS), sentence=True),
            complete_while_typing=False,
            enable_open_in_editor=True,
        )

    def run(self) -> None:
        """Runs until end of file. Raises errors that prevent a conversation: nobody should type a prompt that cannot be
        sealed.
        """
        with waiting("fetching the manifest"):
            models = self._client.models()
        model = self._params.get("model") or next(iter(models), "no model")
        err().print(f"A sealed chat with [bold]{printable(model)}[/bold]. /help lists the keys and commands.")
        err().print(lock.line(self._client.verification), markup=False, style="green")
        while (typed := self._typed()) is not None:
            try:
                if typed.startswith("/"):
                    if not self._command(*typed.partition(" ")[::2]):
                        return
                else:
                    self._ask(typed)
            except LacreError as exc:
                tell(exc)  # the person can try again, or ask something else

    def _typed(self) -> str | None:
        """The next input that is not empty; None at the end."""
        while True:
            try:
                typed = self._prompt.prompt("> ").strip()
            except KeyboardInterrupt:
                continue  # drops the line, as a shell does
            except EOFError:
                return None
            if typed:
                return typed

    def _ask(self, question: str) -> None:
        asked = [*self._turns, {"role": "user", "content": question}]
        stream = self._client.chat_stream(asked, **self._params)
        try:
            pace = show(stream, self._display())
        except KeyboardInterrupt:
            stream.close()
            err().print("stopped; the question and its answer are forgotten", style="dim")
            return
        self._turns = [*asked, {"role": "assistant", "content": stream.text}]
        err().print(_told(stream, pace), style="dim", markup=False)

    def _command(self, name: str, rest: str) -> bool:
        """False if the command ends the conversation."""
        match name:
            case "/clear":
                self._turns = [turn for turn in self._turns if turn["role"] == "system"]
                err().print("forgotten", style="dim")
            case "/system":
                self._turns = [{"role": "system", "content": rest}] if rest else []
                err().print("begun anew", style="dim")
            case "/save":
                save(Path(rest.strip() or "chat.md"), self._turns)
                err().print(f"written to {rest.strip() or 'chat.md'}", style="dim", markup=False)
            case "/lock":
                lock.show(self._client.verification)
            case "/quit" | "/exit":
                return False
            case _:
                err().print(HELP, markup=False)
        return True


def save(path: Path, turns: list[dict[str, str]]) -> None:
    """Writes a conversation as Markdown into a new file of mode 0600. Raises SettingsError."""
    text = "\n\n".join(f"**{turn['role']}**\n\n{turn['content']}" for turn in turns)
    try:
        with open(path, "xb", opener=private_files.opener) as file:
            file.write(f"{text}\n".encode("utf-8", "backslashreplace"))
    except OSError as exc:
        raise SettingsError(f"{path} cannot be written ({exc.strerror}): name a file that does not exist yet") from exc


def _told(stream: ChatStream, pace: Throughput) -> str:
    reply = stream.reply()
    usage = reply.usage
    counts = f"{usage.completion} tokens · {pace.rate:.1f} tokens/s · first after {pace.first:.2f} s"
    cached = f", {usage.cached} from the cache" if usage.cached else ""
    attempts = f" · {reply.attempts} attempts" if reply.attempts > 1 else ""
    return f"{counts} · prompt {usage.prompt}{cached}{attempts} · receipt ✓ · audit #{reply.audit.index} ✓"


def _history(path: Path | None) -> History:
    """In memory, or in a file that only its owner can read. Raises SettingsError."""
    if path is None:
        return InMemoryHistory()
    try:
        with open(path, "ab", opener=private_files.opener) as file:
            private_files.check(path, os.fstat(file.fileno()).st_mode)
    except OSError as exc:
        raise SettingsError(f"{path} cannot be written ({exc.strerror}): name another file with --history") from exc
    return FileHistory(str(path))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
