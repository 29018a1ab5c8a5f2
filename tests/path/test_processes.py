"""What starts, ends; what dies, is told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import httpx2
import pytest

import lacre
from lacre_backend.models.gguf import find
from parts.up import LACRE, Up, environment, run, ticks, wait_until_gone
from parts.waiting import wait_until

INTERRUPTS = (signal.SIGINT, signal.SIGKILL)


def fails(state: Path, *arguments: str, port: int = 0) -> str:
    """What a `lacre up` says that cannot start."""
    failed = run("up", "--state", str(state), "--port", str(port), *arguments, state=state)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    return failed.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in INTERRUPTS)])
def test_nothing_is_left_behind(own: Up, number: signal.Signals) -> None:
    children = list(own.children().values())
    assert len(children) == 3
    # A terminal sends Ctrl-C to a whole process group: the others are ended in order, after the answers under way.
    assert os.getpgid(own.process.pid) not in map(os.getpgid, children)
    status = own.stop(number)
    assert wait_until_gone(children) == []
    assert status == (-9 if number is signal.SIGKILL else 0)


@pytest.mark.slow
def test_a_second_up_finds_its_keys_again(own: Up) -> None:
    assert "already runs" in fails(own.state)
    own.stop()
    with Up.start(own.state) as second:
        assert second.url.partition("?")[2] == own.url.partition("?")[2]
        with second.client(token=own.token) as client:
            assert client.chat("Hi.", max_tokens=2).text


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} is taken" in fails(tmp_path / "state", port=port)


def test_a_state_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "--state" in fails(tmp_path / "file" / "state")


@pytest.mark.slow
def test_a_module_of_the_same_name_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nats", "lacre_gateway", "logging"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    Up.start(tmp_path / "state").stop()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such model file"), (b"not a model at all", "is not a GGUF file"), (b"", "is not a GGUF file")],
)
def test_a_model_that_is_none(tmp_path: Path, content: bytes | None, said: str) -> None:
    model = tmp_path / "model.gguf"
    if content is not None:
        model.write_bytes(content)
    told = fails(tmp_path / "state", "--model", str(model))
    assert said in told
    assert str(model) in told.replace("\n", "")


@pytest.mark.slow
def test_a_model_file_of_an_odd_name(tmp_path: Path) -> None:
    model = tmp_path / "-My Model (Q4) é#%20?.gguf"
    model.symlink_to(find().path)
    with Up.start(tmp_path / "state", "--model", str(model)) as live, live.client() as client:
        [name] = client.models()
        assert name == "my-model-q4-e-20"
        assert client.get(f"/v1/models/{name}").json()["id"] == name
        assert client.chat("Hi.", max_tokens=2, model=name).text


def test_two_model_files_with_one_id(tmp_path: Path) -> None:
    models = [tmp_path / "My Model.gguf", tmp_path / "my-model.gguf"]
    told = fails(tmp_path / "state", *(f"--model={model}" for model in models))
    assert all(str(model) in told for model in models)


def test_a_state_of_message_servers_elsewhere_is_left_alone(tmp_path: Path) -> None:
    content = '{"pools": {"legal": ["m"]}, "nats": "tls://n:4222", "gateway": "https://g", "replicas": 3}'
    (tmp_path / "site.json").write_text(content)
    assert "--state" in fails(tmp_path)
    assert (tmp_path / "site.json").read_text() == content


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_demo(number: signal.Signals, tmp_path: Path) -> None:
    """No demonstration, no success, and no part of a file in the cache."""
    env = environment(tmp_path / "state")
    process = subprocess.Popen([*LACRE, "demo", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stderr is not None
    assert process.stderr.readline()  # it has begun to start things
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"lock"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_of_the_chat_page(tmp_path: Path) -> None:
    """It prints one link, which leads to the page, and leaves nothing behind."""
    env = environment(tmp_path / "state") | {"TMPDIR": str(tmp_path)}
    command = [*LACRE, "demo", "--web", "--as-shipped"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        links = (line.strip() for line in process.stdout if line.startswith("http"))
        opened = httpx2.get(next(links), follow_redirects=False)
        assert (opened.status_code, opened.headers["location"]) == (303, "/")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert not list(tmp_path.glob("lacre-demo-*"))


class TestDeaths:
    @pytest.mark.slow
    def test_the_worker_killed_in_mid_stream(self, own: Up) -> None:
        """The stream says that it broke; everything else runs on, and the worker comes back."""
        others = {name: pid for name, pid in own.children().items() if name != "lacre_backend"}
        with own.client(resume=0) as client:
            stream = client.chat_stream("Tell me a very long story.", max_tokens=2000)
            next(stream)
            os.kill(own.children()["lacre_backend"], signal.SIGKILL)
            with pytest.raises(lacre.TruncatedStream):
                list(stream)
            assert client.chat("Hi.", max_tokens=2).text, "asked again until the worker was back"
        assert {name: own.children()[name] for name in others} == others
        assert own.stop() == 0
        said = [line for line in own.said() if line.startswith("worker ")]
        assert said[0].startswith("worker ended with status -9 (Killed)")
        assert said[1:] == ["worker restarts in 1 s", "worker was restarted"]

    @pytest.mark.parametrize("name", ["nats-server", pytest.param("lacre_gateway", marks=pytest.mark.slow)])
    def test_what_all_depend_on_ends_everything(self, own: Up, name: str) -> None:
        os.kill(own.children()[name], signal.SIGKILL)
        assert own.process.wait(15) == 1
        assert f"{name.removeprefix('lacre_')} ended with status -9 (Killed)" in "".join(own.said())

    @pytest.mark.slow
    @pytest.mark.parametrize("folder", ["José's 模型 $HOME"])
    def test_two_workers_finish_each_others_answers(self, tmp_path: Path, folder: str) -> None:
        """What the README promises, on one machine: the worker that answers is killed, and the stream goes on."""
        (tmp_path / folder).mkdir()
        with Up.start(tmp_path / folder / "state", "--workers", "2") as own, own.client() as client:
            first = own.workers()
            assert len(first) == 2
            before = {pid: ticks(pid) for pid in first}
            stream = client.chat_stream("Tell me a long story about a fox.", max_tokens=120, temperature=0)
            pieces = [next(stream) for _ in range(20)]
            victim = max(first, key=lambda pid: ticks(pid) - before[pid])
            os.kill(victim, signal.SIGKILL)
            pieces += list(stream)
            assert "".join(pieces) == stream.text and stream.finish_reason in ("stop", "length")
            assert len(stream.parts) == 1, "it was resumed once"
            wait_until(lambda: len(own.workers()) >= 2, 30)
            assert victim not in own.workers() and len(own.workers()) == 2
        said = own.said()
        hint = next(line for line in said if line.startswith("In another shell:")).removeprefix("In another shell:")
        shown = subprocess.run(
            ["sh", "-c", f'{hint.partition(" && ")[0]}; printf %s "$LACRE_URL"'], check=True, capture_output=True, text=True
        )
        assert shown.stdout == own.url, "the hint can be copied as it is"
        [restarted] = [line for line in said if line.endswith("was restarted")]
        assert restarted in ("worker-n1 was restarted", "worker-n2 was restarted")
