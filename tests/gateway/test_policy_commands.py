"""`lacre policy`, as whoever writes rules uses it; and what other rules would have made of a real log."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lacre_gateway.audit.check import verify
from lacre_gateway.audit.entries import RELOAD_REFUSED, RELOADED, AdminIntent, Entry, Intent, encode
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.policy.cedar import PolicySet
from lacre_gateway.policy.explain import Explanation, explain, requested
from lacre_gateway.policy.question import AdminQuestion, AnyQuestion
from lacre_gateway.policy.replay import Replay, replay
from parts.commands import run_lacre
from parts.policies import BROKEN, CHAT, FAMILY, RULES, SCHEMA, USAGE, asked, copied
from parts.stage import EchoStage, Kept


def run(*args: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
    return run_lacre("policy", *args, stdin=given)


def said(*args: str | Path, given: str = "") -> Any:
    done = run(*args, "--json", given=given)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_check(tmp_path: Path) -> None:
    found = said("check")
    assert found["policies"] == sorted(RULES.policies.names.values())
    assert (found["cases"], found["policy_set"], found["rules"]) == (len(RULES.cases), RULES.policies.digest, RULES.digest)
    assert "a gateway would activate them" in run("check", copied(tmp_path)).stdout


def test_copy(tmp_path: Path) -> None:
    """A set to edit, which a gateway would activate. No folder with anything in it is changed, and no half is left."""
    folder = tmp_path / "etc" / "policies"
    done = run("copy", folder)
    assert done.returncode == 0 and "lacre policy check" in done.stdout, done.stderr
    assert said("check", folder)["rules"] == RULES.digest
    assert [path.name for path in folder.parent.iterdir()] == ["policies"]
    (folder / "default.cedar").unlink()
    for refused in (folder, tmp_path / "file" / "policies"):
        (tmp_path / "file").write_text("")
        done = run("copy", refused)
        assert done.returncode == 1 and done.stderr.startswith("error: "), done.stdout
    assert not (folder / "default.cedar").exists()
    (tmp_path / "empty").mkdir()
    assert run("copy", tmp_path / "empty").returncode == 0


NESTED = f'@id("x") permit (principal, action, resource) when {{ {"(" * 20_000}true{")" * 20_000} }};'


def deep(folder: Path) -> None:
    """Rules that end the process of a parser."""
    (folder / "x.cedar").write_text(NESTED)


KINDS: dict[str, tuple[Callable[[Path], Any], str, str]] = {**BROKEN, "ends a parser": (deep, "syntax", "")}


@pytest.mark.parametrize(
    "kind", ["no schema", "syntax", "schema violation", "a case that fails", "a folder for a file", "ends a parser"]
)
def test_check_says_what_is_wrong(kind: str, tmp_path: Path) -> None:
    spoil, _, place = KINDS[kind]
    folder = copied(tmp_path)
    spoil(folder)
    done = run("check", folder)
    assert done.returncode == 1 and (place or "nested too deep") in done.stderr and "Traceback" not in done.stderr


def test_cases(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    assert run("test", folder).stdout.splitlines()[-1] == f"{len(RULES.cases)} of {len(RULES.cases)} cases hold"
    BROKEN["a case that fails"][0](folder)
    done = run("test", folder)
    assert done.returncode == 1
    assert "FAIL cases/DENY/x.json: it must be denied, and is allowed by models-for-everyone" in done.stdout


def why(policies: str, values: dict[str, Any]) -> Explanation:
    question, missing = requested(values)
    return explain(PolicySet.parse(SCHEMA, {"x.cedar": policies}), question, missing)


def test_an_explanation_is_the_decision() -> None:
    """Of every case there is, policy by policy, as Cedar has it of all of them together."""
    for case in RULES.cases:
        question = case.request.question()
        found = explain(RULES.policies, question)
        decision = RULES.policies.decide(question)
        assert (found.allowed, found.missing) == (decision.allowed, ())
        assert tuple(sorted(voice.name for voice in found.deciding)) == decision.policies


def test_explain_names_what_decides_and_what_nearly_did() -> None:
    values = {**CHAT, "action": "http", "principal": {**CHAT["principal"], "scopes": [], "plan": None}}
    found = why(
        f"""@id("a") @advice("ask Olga") permit (principal, action == Action::"http", resource)
            when {{ context.scopes.contains("x") }};
            @id("b") permit (principal, action == Action::"chat", resource);
            @id("c") forbid ({FAMILY}) when {{ context.max_tokens == 512 }};""",
        values,
    )
    assert (found.allowed, [voice.name for voice in found.deciding]) == (False, ["c"])
    assert [(voice.name, dict(voice.annotations)) for voice in found.near] == [("a", {"advice": "ask Olga"})]


@pytest.mark.parametrize(
    ("left_out", "missing", "condition"),
    [
        (["max_tokens"], ["max_tokens"], "context.max_tokens < 9"),
        (["kem"], ["post_quantum"], "context.post_quantum"),
        (["kem"], ["kem"], 'context.kem like "X*"'),
        (["hour", "address"], ["address", "hour"], 'context.hour == 1 || context.address == ip("::1")'),
        (["scopes"], ["scopes"], 'if context.scopes.contains("a") then false else true'),
        (["plan"], ["plan"], 'context has plan && context.plan == "gold"'),
    ],
)
def test_explain_says_what_it_depends_on(left_out: list[str], missing: list[str], condition: str) -> None:
    full = {**CHAT, "address": "192.0.2.1", "hour": 3, "principal": {**CHAT["principal"], "plan": None}}
    values = {name: value for name, value in full.items() if name not in left_out}
    values["principal"] = {name: value for name, value in full["principal"].items() if name not in left_out}
    when, forbid = f'@id("a") permit ({FAMILY}) when {{ {condition} }};', f'@id("b") forbid ({FAMILY})'
    depends = why(when, values)
    assert (depends.allowed, list(depends.missing)) == (None, missing)
    # A forbid may still turn it; what is forbidden anyway, or about something else, depends on nothing.
    assert why(f'@id("a") permit ({FAMILY}); {forbid} when {{ {condition} }};', values).allowed is None
    assert why(f"{when} {forbid};", values).allowed is False
    other = f'@id("b") permit (principal, action == Action::"embed", resource) when {{ {condition} }};'
    assert why(f'@id("a") permit ({FAMILY}); {other}', values).allowed is True
    assert why(when, full).allowed is not None


def test_explain_of_a_policy_that_fails() -> None:
    forbid = f'@id("b") forbid ({FAMILY}) when {{ context.max_tokens * 9223372036854775807 > 0 }};'
    found = why(f'@id("a") permit ({FAMILY}); {forbid}', CHAT)
    assert (found.allowed, [(voice.name, voice.failed) for voice in found.deciding]) == (False, [("b", True)])


@pytest.mark.slow
def test_explain_command(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"principal": CHAT["principal"], "action": "chat", "pool": "p", "model": "m"}))
    text = run("explain", tmp_path / "r.json").stdout
    assert text.startswith("depends on context.max_tokens, which the request does not contain")
    assert "output-ceiling (forbid, needs context.max_tokens)" in text
    found = said("explain", "-", given=json.dumps({**CHAT, "max_tokens": 99999}))
    assert (found["decision"], [voice["id"] for voice in found["decided_by"]]) == ("deny", ["output-ceiling"])
    assert run("explain", "-", given=json.dumps({**USAGE, "gateway": "g7"})).stdout.startswith("allow, by\n  admin-by-scope")
    assert run("explain", "-", given=json.dumps(asdict(intent(asked())))).stdout.startswith("allow, by\n  models-for-everyone")
    for bad in ("{", "[]", "{}", json.dumps({**CHAT, "colour": 1}), json.dumps({**CHAT, "hour": 24})):
        done = run("explain", "-", given=bad)
        assert done.returncode == 1 and "Traceback" not in done.stderr


# Replay


def asdict(entry: Entry) -> dict[str, Any]:
    members: dict[str, Any] = json.loads(encode(entry)[-1])
    return members


def intent(question: AnyQuestion, number: int = 0) -> Intent | AdminIntent:
    """As a gateway records it."""
    who, decision = question.principal, RULES.policies.decide(question)
    both: dict[str, Any] = {
        "request_id": f"{number:032x}", "time": question.time, "subject": who.subject, "tenant": who.tenant,
        "issuer": who.issuer, "jti": None, "address": question.address, "action": question.action.value, "groups": who.groups,
        "scopes": who.scopes, "plan": who.plan, "decision": "allow" if decision.allowed else "deny",
        "policies": decision.policies, "policy_set": decision.policy_set, "entities": decision.entities,
    }  # fmt: skip
    if isinstance(question, AdminQuestion):
        return AdminIntent(**both, gateway=question.gateway, target=None)
    return Intent(
        **both, pool=question.pool, model=question.model, shape=question.shape.value, kem=question.kem.label,
        max_tokens=question.max_tokens, sealed_bytes=question.sealed_bytes, enc="", reserved_prompt_tokens=None,
        reserved_tokens=None,
    )  # fmt: skip


def replayed(policies: str, *entries: Entry) -> Replay:
    data = [part for entry in entries for part in encode(entry)]
    return replay(data, PolicySet.parse(SCHEMA, {"x.cedar": f'@id("x") {policies}'}))


@pytest.mark.parametrize(
    ("condition", "turned"),
    [
        ("context.max_tokens > 600", {"max_tokens": 700}),
        ("context.sealed_bytes > 5000", {"sealed_bytes": 6000}),
        ("context.post_quantum == false", {"kem": "X25519"}),
        ('context.shape == "pad"', {"shape": "pad"}),
        ("context.hour == 22", {"hour": 22}),
        ('context.address == ip("::1")', {"address": "::1"}),
        ('context.scopes.contains("s")', {"principal": {"scopes": ["s"]}}),
        ('context has plan && context.plan == "free"', {"principal": {"plan": "free"}}),
        ('principal in Group::"acme/z"', {"principal": {"groups": ["a", "z"]}}),
        ('principal in Group::"acme/group-150"', {"principal": {"groups": [f"group-{number}" for number in range(200)]}}),
        ('principal.issuer == "i"', {"principal": {"issuer": "i"}}),
        ('principal == User::"acme/bob"', {"principal": {"subject": "bob"}}),
        ('resource.name == "big"', {"model": "big"}),
        ('resource in Pool::"p2"', {"pool": "p2"}),
        ('action == Action::"embed"', {"action": "embed"}),
    ],
)
def test_replay_depends_on_everything_that_a_rule_may_ask_for(condition: str, turned: dict[str, Any]) -> None:
    """Long lists too, which stand in an annex."""
    entries = [intent(asked(), number=1), intent(asked(**turned), number=2), intent(asked(), number=3)]
    found = replayed(f"permit ({FAMILY}) unless {{ {condition} }};", *entries)
    assert (found.decided, found.unsure) == (3, [])
    assert [change.asked.members["request_id"][-1] for change in found.changes] == ["2"]
    assert not found.changes[0].becomes.allowed


def test_replay_of_what_administrators_did() -> None:
    rule = 'permit (principal, action in Action::"admin", resource == Gateway::"g1");'
    found = replayed(rule, intent(asked(USAGE)), intent(asked(USAGE, gateway="g2")))
    assert [change.asked.resource for change in found.changes] == ["g2"]
    assert len(found.reasons) == 1  # by another policy than was recorded


def test_replay_guesses_nothing() -> None:
    """Entries of another version: an action that is not known here, entities that were written otherwise."""
    good = intent(asked(), number=1)
    unknown, otherwise = asdict(good) | {"action": "fly"}, asdict(good) | {"entities": "00"}
    data = [*encode(good), json.dumps(unknown).encode(), json.dumps(otherwise).encode()]
    found = replay(data, RULES.policies)
    assert (found.decided, [index for index, _ in found.unsure]) == (1, [1, 2])


def test_replay_of_a_time() -> None:
    data = [part for hour in range(6) for part in encode(intent(asked(hour=hour), number=hour))]
    assert replay(data, RULES.policies, since=3600.0, until=3 * 3600.0).decided == 2


# A real gateway's log, and a real gateway's rules


async def one(gateway: EchoStage, subject: str, max_tokens: int | None) -> str:
    """The id of a request: a chat, or where there are no tokens something that the action `http` is for."""
    wire = Kept()
    async with gateway.client(gateway.token(subject), transport=wire, shape="none") as client:
        if max_tokens is None:
            assert (await client.get("/internal/things")).status_code == 404  # the SDK knows that OpenAI's API has no such path
        else:
            assert (await client.chat("Mare Nostrum", max_tokens=max_tokens)).text
    [proof] = wire.proofs
    request_id: str = proof.members["request_id"]
    return request_id


PROPOSED = """
    @id("alice-is-brief")
    forbid (principal == User::"acme/alice", action in Action::"sealed", resource) when { context.max_tokens > 100 };
    @id("http-for-bob")
    permit (principal == User::"acme/bob", action == Action::"http", resource);
"""


@pytest.mark.slow
async def test_replay_of_a_real_log(tmp_path: Path) -> None:
    """Requests through a gateway; then exactly those that the changed rules alter, and no other."""
    asked_for = [(subject, tokens) for subject in ("alice", "bob", "carol") for tokens in (5, 100, 101, 150, None)]
    async with EchoStage.standing(tmp_path) as gateway:
        await gateway.start()
        ids = await asyncio.gather(*(one(gateway, subject, tokens) for subject, tokens in asked_for))
        by_request = dict(zip(asked_for, ids, strict=True))
        proposed = copied(tmp_path)
        (proposed / "proposed.cedar").write_text(PROPOSED)
        while_it_runs = said("replay", gateway.audit, "--against", proposed)
        assert await gateway.kill(signal.SIGTERM) == 0
        found = said("replay", gateway.audit, "--against", proposed)
        same = said("replay", gateway.audit, "--against", copied(tmp_path / "same"))
        table = run("replay", gateway.audit, "--against", proposed).stdout
        assert verify(gateway.audit, gateway.key).wrong is None
    turned = {change["request_id"]: (change["was"]["decision"], change["becomes"]["policies"]) for change in found["changes"]}
    assert turned == {
        by_request["alice", 101]: ("allow", ["alice-is-brief"]),
        by_request["alice", 150]: ("allow", ["alice-is-brief"]),
        by_request["bob", None]: ("deny", ["http-for-bob"]),
    }
    assert while_it_runs == found
    assert (found["decided"], found["unsure"]) == (15, [])
    # Asks for as many tokens as a client does by itself, and was denied anyway.
    assert [change["request_id"] for change in found["other_policies"]] == [by_request["alice", None]]
    assert (same["decided"], same["changes"], same["other_policies"]) == (15, [], [])
    assert (
        "15 requests decided again: 3 would change, 2 to deny and 1 to allow; 1 keep their decision by other policies" in table
    )
    assert table.count("alice-is-brief") == 2 and table.count("acme/bob") == 1


def restored(folder: Path) -> None:
    """As it ships."""
    fresh = copied(folder.parent / "fresh")
    shutil.rmtree(folder)
    fresh.rename(folder)
    fresh.parent.rmdir()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_broken_set_never_takes_the_service_down(tmp_path: Path) -> None:
    """Every way to break it, one after the other, with requests running: none of them fails."""
    rules = copied(tmp_path)
    async with EchoStage.standing(tmp_path, policies=rules) as gateway:

        async def refused(since: float = 0.0) -> dict[str, Any] | None:
            """What `readyz` says of a set that does not hold, where that was found out later than `since`."""
            detail: dict[str, Any] | None = (await gateway.detail())["rules"]["refused"]
            return detail if detail is not None and detail["since"] > since else None

        await gateway.start()
        async with gateway.load(6) as load:
            last = 0.0
            for name, (spoil, fault, place) in KINDS.items():
                spoil(rules)
                await gateway.until(lambda last=last: refused(last))
                told = await refused()
                assert told is not None and (told["fault"], told["file"]) == (fault, place), name
                assert await gateway.ready()
                await gateway.until(lambda served=load.whole + 5: load.whole > served)
                last = told["since"]
                restored(rules)
            while await refused():
                await asyncio.sleep(0.02)
            (rules / "strict.cedar").write_text('@id("strict") forbid (principal, action, resource in Pool::"other");')
            while (await gateway.detail())["rules"]["policy_set"] == RULES.policies.digest:
                await asyncio.sleep(0.02)
        assert await gateway.kill(signal.SIGTERM) == 0
        assert load.failed == {} and load.whole > 5 * len(KINDS)
        entries = [json.loads(entry) for entry in LogReader(gateway.audit, gateway.key).entries()]
        assert verify(gateway.audit, gateway.key).wrong is None
    events = [(entry["event"], entry["reason"]) for entry in entries if entry.get("event") in (RELOADED, RELOAD_REFUSED)]
    assert {reason for event, reason in events if event == RELOAD_REFUSED} == {fault for _, fault, _ in KINDS.values()}
    assert [event for event, _ in events].count(RELOADED) >= 2
