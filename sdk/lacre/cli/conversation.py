"""The conversation of `lacre chat` at a terminal: what is typed, what is shown, and what is remembered of it.

What somebody types is a prompt, and prompts are what Lacre keeps secret: nothing of it is written to a disk unless a file is
named for it, and that one is for its owner alone.
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
Enter sends. Alt-Enter or Ctrl-J begins a new line, and what is pasted keeps its own. Up and down go through what was typed.
Ctrl-C cuts an answer off, Ctrl-D ends the chat.

/clear         forget the conversation so far
/system TEXT   begin anew with a system message
/save FILE     write the conversation down, for your eyes alone
/lock          what was verified, check by check
/help          this
/quit          end the chat"""

COMMANDS: Final = ("/clear", "/system", "/save", "/lock", "/help", "/quit")


class Conversation:
    """turns: what was said before, such as a system message. params: of each request."""

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
        """Until end of file. Raises what keeps a conversation from beginning: nothing is typed into what cannot be sealed."""
        with waiting("fetching the manifest"):
            models = self._client.models()
        model = self._params.get("model") or next(iter(models), "no model")
        err().print(f"A sealed chat with [bold]{printable(model)}[/bold]. /help says what the keys do.")
        err().print(lock.line(self._client.verification), markup=False, style="green")
        while (typed := self._typed()) is not None:
            try:
                if typed.startswith("/"):
                    if not self._command(*typed.partition(" ")[::2]):
                        return
                else:
                    self._ask(typed)
            except LacreError as exc:
                tell(exc)  # somebody is there to try again, or to ask something else

    def _typed(self) -> str | None:
        """What is not empty; None at the end."""
        while True:
            try:
                typed = self._prompt.prompt("> ").strip()
            except KeyboardInterrupt:
                continue  # a line is given up, as in a shell
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
            err().print("cut off, and forgotten with its question", style="dim")
            return
        self._turns = [*asked, {"role": "assistant", "content": stream.text}]
        err().print(_told(stream, pace), style="dim", markup=False)

    def _command(self, name: str, rest: str) -> bool:
        """False for the last one."""
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
        raise SettingsError(f"{path} cannot be written ({exc.strerror}): name a file that is not there yet") from exc


def _told(stream: ChatStream, pace: Throughput) -> str:
    reply = stream.reply()
    usage = reply.usage
    counts = f"{usage.completion} tokens · {pace.rate:.1f} tokens/s · first after {pace.first:.2f} s"
    cached = f", {usage.cached} from the cache" if usage.cached else ""
    attempts = f" · {reply.attempts} attempts" if reply.attempts > 1 else ""
    return f"{counts} · prompt {usage.prompt}{cached}{attempts} · receipt ✓ · audit #{reply.audit.index} ✓"


def _history(path: Path | None) -> History:
    """In memory, or in a file that its owner alone can read. Raises SettingsError."""
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
