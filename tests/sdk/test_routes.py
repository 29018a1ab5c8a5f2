"""Routes of the manifest: shares, stickiness, pools that stand by, and a caller's own choice."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lacre
from lacre import problems
from lacre.errors import InvalidMessage
from lacre.jose.claims import Members
from lacre.trust.manifest import Manifest
from lacre.trust.manifest_store import KEY_BYTES, VersionFile
from lacre.trust.routes import MAX_ROUTES, MAX_SHARE, MAX_TARGETS, SEED, ModelRoute, RouteTarget, sticky_seed
from lacre.wire.header import Kem
from lacre.wire.opening import PrivateKey
from lacre_backend.api.app import create_app
from parts.chat_app import ChatApp
from parts.echo_engine import EchoEngine
from parts.relay import Relay, Respond, connect, refusing

SEEDS = st.binary(min_size=SEED, max_size=SEED)
SHARES = st.lists(st.integers(0, MAX_SHARE), min_size=1, max_size=MAX_TARGETS)


def route(*shares: int, sticky: bool = True) -> ModelRoute:
    return ModelRoute(tuple(RouteTarget(f"p{number}", "m", share) for number, share in enumerate(shares)), sticky)


def two(*targets: tuple[str, str, int], sticky: bool = True, name: str = "assistant") -> Relay:
    """A gateway with the pools `default` (model `tiny`) and `canary` (model `new`), and one route."""
    made = ModelRoute(tuple(RouteTarget(*target) for target in targets), sticky)
    return Relay(ChatApp(), beside={"canary": Relay(ChatApp(), model="new")}, routes={name: made})


def in_turn(*kinds: problems.Problem) -> Respond:
    """For `respond`: each of these refusals once."""
    rest = [refusing(kind) for kind in kinds]

    def answer(request: httpx2.Request) -> httpx2.Response | None:
        respond = rest.pop(0)
        return respond(request)

    return answer


def served(relay: Relay) -> dict[str, list[str]]:
    """By pool: the model that each sealed request names in its body, which must be the outer one."""
    found: dict[str, list[str]] = {}
    for name, pool in {"default": relay, **relay.beside}.items():
        assert isinstance(pool.app, ChatApp)
        found[name] = [json.loads(body)["model"] for body in pool.app.bodies]
        answered = [request.headers["lacre-model"] for request in pool.sealed]
        assert answered[-len(found[name]) :] == found[name] or not found[name]
    return found


class TestDraws:
    @given(SHARES, SEEDS)
    def test_every_pool_once_and_the_rest_in_order(self, shares: list[int], seed: bytes) -> None:
        made = route(*shares)
        ordered = made.ordered(seed)
        assert sorted(ordered, key=made.targets.index) == list(made.targets)
        assert list(ordered[1:]) == [target for target in made.targets if target is not ordered[0]]
        assert ordered[0].share or not any(shares), "a pool that stands by is never drawn"
        assert any(shares) or ordered == made.targets, "without shares, the first has all"
        assert ordered == made.ordered(seed)

    @given(SHARES, SEEDS, st.data())
    def test_a_growing_share_takes_and_never_gives(self, shares: list[int], seed: bytes, data: st.DataObject) -> None:
        if not any(shares):
            shares[0] = 1
        grown = data.draw(st.integers(0, len(shares) - 1))
        more = [*shares[:grown], min(shares[grown] + data.draw(st.integers(0, MAX_SHARE)), MAX_SHARE), *shares[grown + 1 :]]
        before, after = route(*shares).ordered(seed)[0].pool, route(*more).ordered(seed)[0].pool
        assert after in (before, f"p{grown}")

    @pytest.mark.parametrize("shares", [(95, 5), (1, 1), (3, 0, 1), (7,), (0, 0), (50, 30, 20), (999, 1)])
    def test_the_shares_are_met(self, shares: tuple[int, ...]) -> None:
        made, key, draws = route(*shares), bytes(KEY_BYTES), 20_000
        drawn = [made.ordered(sticky_seed(key, "r", str(user)))[0] for user in range(draws)]
        for target in made.targets:
            wanted = made.portion(target)
            deviation = (wanted * (1 - wanted) / draws) ** 0.5
            assert abs(drawn.count(target) / draws - wanted) <= 5 * deviation, target
        assert sum(map(made.portion, made.targets)) == pytest.approx(1)

    def test_routes_draw_apart_and_users_too(self) -> None:
        key = secrets.token_bytes(KEY_BYTES)
        seeds = {sticky_seed(key, name, user) for name in ("a", "b") for user in (None, "", "x", "y")}
        assert len(seeds) == 8
        assert sticky_seed(key, "a", "x") != sticky_seed(secrets.token_bytes(KEY_BYTES), "a", "x"), "only the key tells"


class TestForm:
    def test_there_and_back(self) -> None:
        relay = two(("default", "tiny", 95), ("canary", "new", 5))
        manifest = relay.manifest()
        assert Manifest.parse(Members(manifest.members(), "it")) == manifest
        assert "routes" not in Relay(ChatApp()).manifest().members(), "a manifest without routes has the old form"

    def test_what_may_be_missing(self) -> None:
        made = ModelRoute.parse("m", Members({"pools": [{"pool": "a", "later": 1}], "later": 2}, "it"))
        assert made == ModelRoute((RouteTarget("a", "m", 0),)) and made.sticky

    @pytest.mark.parametrize(
        ("said", "told"),
        [
            ({}, "pools"), ({"pools": []}, "1 to 8"), ({"pools": [{"pool": "a", "model": str(n)} for n in range(9)]}, "1 to 8"),
            ({"pools": [{}]}, "pool"), ({"pools": [{"pool": "a b"}]}, "visible"), ({"pools": [{"pool": ""}]}, "visible"),
            ({"pools": [{"pool": "a", "model": "\n"}]}, "visible"), ({"pools": [{"pool": "a", "model": None}]}, "model"),
            ({"pools": [{"pool": "a", "share": -1}]}, "negative"), ({"pools": [{"pool": "a", "share": MAX_SHARE + 1}]}, "most"),
            ({"pools": [{"pool": "a", "share": 0.5}]}, "integer"), ({"pools": [{"pool": "a", "share": True}]}, "integer"),
            ({"pools": [{"pool": "a"}, {"pool": "a"}]}, "once"), ({"pools": [{"pool": "a"}], "sticky": 1}, "sticky"),
        ],
    )  # fmt: skip
    def test_a_wrong_route_is_refused(self, said: dict[str, Any], told: str) -> None:
        with pytest.raises(InvalidMessage, match=told):
            ModelRoute.parse("m", Members(said, "it"))

    def test_a_wrong_name_and_too_many(self) -> None:
        members = two(("default", "tiny", 1)).manifest().members()
        one = members["routes"]["assistant"]
        for routes in ({"": one}, {"a b": one}, {str(number): one for number in range(MAX_ROUTES + 1)}):
            with pytest.raises(InvalidMessage, match=r"name|at most"):
                Manifest.parse(Members(members | {"routes": routes}, "it"))


class TestCalls:
    def test_a_name_of_the_route_becomes_the_pools_model(self) -> None:
        relay = two(("canary", "new", 1), ("default", "tiny", 0))
        with connect(relay) as client:
            reply = client.chat("x", model="assistant")
            assert client.models() == ("tiny", "assistant")
        assert served(relay) == {"default": [], "canary": ["new"]}
        assert reply.raw["model"] == "new" and reply.verification.sealed_to is not None
        assert reply.verification.sealed_to.pool == "canary" and reply.receipt is not None

    def test_other_names_and_no_name_as_before(self) -> None:
        relay = two(("canary", "new", 1))
        with connect(relay) as client:
            client.chat("x")
            client.chat("x", model="tiny")
        assert served(relay) == {"default": ["tiny", "tiny"], "canary": []}

    def test_a_route_of_the_default_models_name_takes_calls_without_a_name(self) -> None:
        relay = two(("canary", "new", 1), name="tiny")
        with connect(relay) as client:
            client.chat("x")
            client.with_options(model="tiny").chat("x")
            client.post("/v1/chat/completions", json={"messages": [{}]}, headers={"lacre-model": "tiny"})
        assert served(relay) == {"default": [], "canary": ["new"] * 3}

    @pytest.mark.parametrize("retries", [0, None])
    def test_a_pool_without_worker_is_passed(self, retries: int | None) -> None:
        relay = two(("canary", "new", 1), ("default", "tiny", 0))
        relay.beside["canary"].respond = refusing(problems.NO_WORKER, retry_after="2")
        with connect(relay, retries=retries) as client:
            reply = client.chat("x", model="assistant")
        assert reply.attempts == 2 and served(relay) == {"default": ["tiny"], "canary": []}
        assert reply.verification.sealed_to is not None and reply.verification.sealed_to.pool == "default"

    @pytest.mark.parametrize(
        "problem",
        [
            problems.FORBIDDEN,
            problems.BUSY,
            problems.WORKER_LOST,
            problems.UNCLAIMED,
            problems.RATE_LIMITED,
            problems.NO_GATEWAY,
            problems.UNAVAILABLE,
        ],
    )
    def test_no_other_refusal_leads_elsewhere(self, problem: problems.Problem) -> None:
        relay = two(("canary", "new", 1), ("default", "tiny", 0))
        relay.beside["canary"].respond = refusing(problem)
        with connect(relay, retries=0) as client, pytest.raises(lacre.LacreError):
            client.chat("x", model="assistant")
        assert not relay.sealed and len(relay.beside["canary"].sealed) == 1

    def test_what_may_be_in_a_queue_stays_in_its_pool(self) -> None:
        """The client asks the same pool again, whose worker may have the first request; and leaves it once it has none."""
        relay = two(("canary", "new", 1), ("default", "tiny", 0))
        canary = relay.beside["canary"]
        canary.respond = in_turn(problems.UNAVAILABLE, problems.UNAVAILABLE, problems.NO_WORKER)
        with connect(relay) as client:
            assert client.chat("x", model="assistant").attempts == 4
        assert (len(canary.sealed), served(relay)) == (3, {"default": ["tiny"], "canary": []})

    def test_no_pool_has_a_worker(self) -> None:
        relay = two(("canary", "new", 1), ("default", "tiny", 0))
        relay.respond = relay.beside["canary"].respond = refusing(problems.NO_WORKER, retry_after="0")
        with connect(relay, retries=1) as client, pytest.raises(lacre.Unavailable):
            client.chat("x", model="assistant")
        assert (len(relay.sealed), len(relay.beside["canary"].sealed)) == (1, 2), "each once, and one retry"

    def test_a_pool_that_loses_its_last_worker_is_passed(self) -> None:
        """The first answer says that the worker was lost; running a chat again does no harm. Then no worker is left."""
        relay = two(("canary", "new", 1), ("default", "tiny", 0))
        relay.beside["canary"].respond = in_turn(problems.WORKER_LOST, problems.NO_WORKER)
        with connect(relay) as client:
            assert client.chat("x", model="assistant").attempts == 3
        assert served(relay) == {"default": ["tiny"], "canary": []}

    def test_what_may_have_run_is_not_sent_again(self) -> None:
        """A path whose body nobody reads is not repeatable, so nothing follows a lost worker."""
        relay = two(("canary", "new", 1), ("default", "tiny", 0))
        relay.beside["canary"].respond = refusing(problems.WORKER_LOST)
        with connect(relay) as client:
            answer = client.post("/v1/predict", content=b"01", headers={"lacre-model": "assistant"})
        assert answer.status_code == problems.WORKER_LOST.status
        assert not relay.sealed and len(relay.beside["canary"].sealed) == 1

    def test_two_lost_workers_are_not_followed_by_a_third_in_another_pool(self) -> None:
        relay = two(("canary", "new", 1), ("default", "tiny", 0))
        relay.respond = refusing(problems.WORKER_LOST)
        relay.beside["canary"].respond = in_turn(problems.WORKER_LOST, problems.NO_WORKER)
        with connect(relay) as client, pytest.raises(lacre.LacreError):
            client.chat("x", model="assistant")
        assert (len(relay.sealed), len(relay.beside["canary"].sealed)) == (1, 2)

    def test_a_pool_that_cannot_be_sealed_to_is_passed(self) -> None:
        relay = two(("canary", "new", 1), ("default", "tiny", 0))
        for spoilt in ({"shapes": ("none",)}, {"lifetime": -1.0}, {"key": PrivateKey.generate(1, Kem.X25519)}):
            canary = relay.beside["canary"]
            before = {name: getattr(canary, name) for name in spoilt}
            for name, value in spoilt.items():
                setattr(canary, name, value)
            relay.version += 1
            with connect(relay, kem=Kem.XWING) as client:
                assert client.chat("x", model="assistant").attempts == 1
            for name, value in before.items():
                setattr(canary, name, value)
        assert served(relay) == {"default": ["tiny"] * 3, "canary": []}

    def test_if_no_pool_can_be_sealed_to_the_first_one_tells_why(self) -> None:
        relay = two(("canary", "new", 1), ("default", "tiny", 0))
        relay.shapes = relay.beside["canary"].shapes = ("none",)
        with connect(relay) as client, pytest.raises(lacre.SettingsError, match="pool 'canary' does not accept"):
            client.chat("x", model="assistant")

    def test_the_callers_own_pool_overrides(self) -> None:
        relay = two(("canary", "new", 1), ("default", "tiny", 0))
        for each in (connect(relay, pool="default"), connect(relay).with_options(pool="default")):
            each.chat("x", model="assistant")
            assert each.models() == ("tiny", "assistant")
        assert served(relay) == {"default": ["tiny", "tiny"], "canary": []}

    def test_the_callers_own_pool_keeps_its_names(self) -> None:
        relay = two(("default", "other", 1), name="tiny")
        with connect(relay, pool="default") as client:
            client.chat("x")
            client.chat("x", model="tiny")
        assert served(relay)["default"] == ["tiny", "tiny"]

    def test_a_pool_that_left_the_manifest(self) -> None:
        relay = two(("gone", "new", 1), ("default", "tiny", 0))
        with connect(relay) as client:
            assert client.chat("x", model="assistant").attempts == 1
        lost = two(("gone", "new", 1))
        with connect(lost) as client, pytest.raises(lacre.SettingsError, match="no pool of the route 'assistant'"):
            client.chat("x", model="assistant")

    def test_a_pin_holds_through_a_route(self) -> None:
        for pins, told in (
            ({"assistant": "sha256:" + "1" * 64}, "receipt names"), ({"new": "sha256:" + "1" * 64}, "receipt names"),
            ({"assistant": "sha256:" + "1" * 64, "new": "sha256:" + "2" * 64}, "nothing was sent"),
        ):  # fmt: skip
            relay = two(("canary", "new", 1))
            with connect(relay, pin_models=pins) as client, pytest.raises(lacre.WrongModel, match=told):
                client.chat("x", model="assistant")
            assert not relay.beside["canary"].sealed or told != "nothing was sent"

    def test_not_for_what_runs_no_model(self) -> None:
        relay = two(("canary", "new", 1), name="tiny")
        with connect(relay) as client:
            client.get("/v1/models")
        assert [request.headers["lacre-pool"] for request in relay.sealed] == ["default"]


class TestStickiness:
    def test_a_user_stays_and_users_spread(self) -> None:
        relay = two(("default", "tiny", 1), ("canary", "new", 1))
        with connect(relay) as client:
            users = [client.with_options(cache_scope=f"user {number}") for number in range(24)]
            seen = [[user.chat("x", model="assistant").raw["model"] for _ in range(3)] for user in users]
        assert all(len(set(each)) == 1 for each in seen)
        assert {each[0] for each in seen} == {"tiny", "new"}

    def test_without_stickiness_each_call_draws(self) -> None:
        relay = two(("default", "tiny", 1), ("canary", "new", 1), sticky=False)
        with connect(relay) as client:
            seen = {client.chat("x", model="assistant").raw["model"] for _ in range(40)}
        assert seen == {"tiny", "new"}

    def test_programs_of_one_folder_draw_alike(self, tmp_path: Path) -> None:
        drawn = []
        for _ in range(6):
            relay = two(("default", "tiny", 1), ("canary", "new", 1))
            with connect(relay, memory=VersionFile(tmp_path / "m")) as client:
                drawn.append(client.chat("x", model="assistant").raw["model"])
        assert len(set(drawn)) == 1
        assert (tmp_path / "m" / "route.key").stat().st_mode & 0o777 == 0o600
        assert VersionFile(tmp_path / "m").sticky_key() != VersionFile(tmp_path / "n").sticky_key()

    def test_no_key_without_routes(self, tmp_path: Path) -> None:
        with connect(Relay(ChatApp()), memory=VersionFile(tmp_path)) as client:
            client.chat("x")
        assert not (tmp_path / "route.key").exists()

    @pytest.mark.parametrize(("content", "mode", "told"), [(b"short", 0o600, "damaged"), (bytes(KEY_BYTES), 0o644, "others"),
                                                           (bytes(KEY_BYTES + 1), 0o600, "damaged")])  # fmt: skip
    def test_a_bad_key_file(self, tmp_path: Path, content: bytes, mode: int, told: str) -> None:
        (tmp_path / "route.key").write_bytes(content)
        (tmp_path / "route.key").chmod(mode)
        relay = two(("default", "tiny", 1))
        with connect(relay, memory=VersionFile(tmp_path)) as client, pytest.raises(lacre.SettingsError, match=told):
            client.chat("x", model="assistant")
        assert not relay.sealed


class TestContinued:
    def relay(self, name: str = "assistant") -> Relay:
        made = ModelRoute((RouteTarget("canary", "new", 1), RouteTarget("default", "tiny", 0)))
        canary = Relay(create_app([EchoEngine(name="new")]), model="new")
        return Relay(create_app([EchoEngine(name="tiny")]), beside={"canary": canary}, routes={name: made})

    def test_a_broken_answer_goes_on_in_its_pool(self) -> None:
        relay = self.relay()
        canary, cut = relay.beside["canary"], [True]

        def once(chunks: list[bytes]) -> list[bytes]:
            if cut.pop() if cut else False:
                relay.routes = {"assistant": ModelRoute((RouteTarget("default", "tiny", 1),))}  # published meanwhile
                relay.version += 1
                return chunks[:3]
            return chunks

        canary.bend = once
        with connect(relay) as client:
            stream = client.chat_stream("some seas and more", model="assistant", max_tokens=400)
            assert "".join(stream) == "some seas and more" and stream.attempts == 2
        assert len(canary.sealed) == 2 and not relay.sealed

    @pytest.mark.parametrize("options", [{}, {"pool": "default"}], ids=["by routes", "with a pool"])
    def test_another_process_goes_on_in_the_answers_pool(self, options: dict[str, Any]) -> None:
        relay, key = self.relay(), secrets.token_bytes(32)
        with connect(relay) as client:
            stream = client.chat_stream("some seas and more", model="assistant", max_tokens=400)
            next(stream)
            state = stream.state(key)
            stream.close()
        relay.routes, relay.version = {}, 2
        with connect(relay, **options) as other:
            assert other.continue_stream(state, key=key).reply().text == "some seas and more"
        assert len(relay.beside["canary"].sealed) == 2 and not relay.sealed
