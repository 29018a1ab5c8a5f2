"""Takes one defence away at a time, and sees which attack notices: `make mutants`.

Each mutation is one line of the product, changed in a copy of the tree, and the one test that must fail for it. A mutation that
no test notices is a defence that nobody would miss.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
ROOMS: Final = ("sdk", "fabric", "gateway", "backend")
COPIED: Final = (*ROOMS, "policies", "tests/hostile", "tests/parts", "tests/conftest.py", "pyproject.toml")
LIMIT: Final = 10  # seconds for a test that a mutation sends round for ever

SDK: Final = "sdk/lacre"
WIRE: Final = "sdk/lacre/wire"
FABRIC: Final = "fabric/lacre_fabric"
NODE: Final = "backend/lacre_backend/node.py"
HTTP1: Final = "sdk/lacre/http1.py"
LISTENING: Final = "sdk/lacre/listening.py"
INSIDE: Final = "backend/lacre_backend/inside.py"
ADMISSION: Final = "sdk/lacre/asgi/admission.py"


@dataclass(frozen=True, slots=True)
class Mutation:
    """defence: what it takes away. old: occurs once in `file`, and is replaced by `new`. test: under `tests/hostile/`."""

    defence: str
    file: str
    old: str
    new: str
    test: str

    def __str__(self) -> str:
        return self.defence


MUTATIONS: Final = (
    # wire
    Mutation("the final chunk has an AAD of its own", f"{WIRE}/chunks.py",
             '_FINAL: Final = b"final"', '_FINAL: Final = b""', "test_stream.py::test_early_final"),
    Mutation("a record's nonce counts it", f"{WIRE}/hpke.py",
             "return (self._base_nonce ^ self._sequence).to_bytes", "return self._base_nonce.to_bytes",
             "test_stream.py::test_swap"),
    Mutation("the answer's key is derived from its nonce", f"{WIRE}/ohttp.py",
             "prk = hpke.extract(header.enc + nonce, secret)", "prk = hpke.extract(header.enc, secret)",
             "test_replay.py::test_splice"),
    Mutation("a record is at most 16 KiB", f"{WIRE}/framing.py",
             "if length > MAX_SEALED_CHUNK:", "if False:", "test_stream.py::test_huge_length"),
    Mutation("the final chunk is at most 16 KiB", f"{WIRE}/framing.py",
             "if self._in_final and len(view) - position > MAX_SEALED_CHUNK:", "if False:",
             "test_stream.py::test_huge_final_chunk"),
    Mutation("a record that is not final holds a byte", f"{WIRE}/framing.py",
             "if length <= TAG:", "if False:", "test_stream.py::test_empty_record"),
    Mutation("an answer without its final chunk is not whole", f"{WIRE}/framing.py",
             "if not self._in_final or len(self._rest) < TAG:", "if False:", "test_stream.py::test_truncate"),
    Mutation("a gateway walks the chunks to the final one", f"{WIRE}/header.py",
             "    deframer.close()\n", "    pass\n", "test_outside.py::test_cut_outside"),
    Mutation("a request has a bounded number of chunks", f"{WIRE}/opening.py",
             "return ChunkOpener(context.aead, MAX_REQUEST_CHUNKS)", "return ChunkOpener(context.aead, None)",
             "test_sealed.py::test_chunk_flood"),
    Mutation("a key has one KEM", f"{WIRE}/opening.py",
             "if key is None or key.config.kem is not header.suite.kem:", "if key is None:",
             "test_sealed.py::test_another_kem"),
    Mutation("a worker takes the suites that its configuration offers", f"{WIRE}/opening.py",
             "if not key.config.offers(header.suite):", "if False:", "test_sealed.py::test_not_offered"),
    Mutation("content has a bounded number of chunks", f"{WIRE}/bhttp.py",
             "if self._request and pieces > MAX_REQUEST_PIECES:", "if False:", "test_sealed.py::test_tiny_pieces"),
    Mutation("after a message only zeros follow", f"{WIRE}/bhttp.py",
             "if padding.count(0) != len(padding):", "if False:", "test_sealed.py::test_after_the_end"),
    Mutation("the content has the length that it announces", f"{WIRE}/bhttp.py",
             "if announced not in (None, received) and (self._request or received):", "if False:",
             "test_sealed.py::test_content_length"),
    Mutation("a section holds so many fields", f"{WIRE}/bhttp.py",
             "        if len(fields) == MAX_FIELDS:", "        if False:", "test_sealed.py::test_header_flood"),
    Mutation("two lengths that differ are none", f"{WIRE}/fields.py",
             "if len(values) > 1 or not _LENGTH.fullmatch(values[0]):", "if not _LENGTH.fullmatch(values[0]):",
             "test_sealed.py::test_two_lengths"),
    Mutation("fields of a connection stay outside", f"{WIRE}/fields.py",
             'if name in _CONNECTION_FIELDS or (name == b"te" and value != b"trailers"):', "if False:",
             "test_sealed.py::test_transfer_coding"),
    Mutation("a field's value has no control characters", f"{WIRE}/fields.py",
             "if not _VALUE.fullmatch(value):", "if False:", "test_sealed.py::test_header_splitting"),
    Mutation("a field's name is a token in small letters", f"{WIRE}/fields.py",
             "if not _NAME.fullmatch(name):", "if False:", "test_sealed.py::test_header_splitting"),
    Mutation("there is no CONNECT inside the seal", f"{WIRE}/fields.py",
             'if not _METHOD.fullmatch(method) or method == b"CONNECT":', "if False:", "test_asked.py::test_connect"),
    # trust and memory
    Mutation("signatures are verified", f"{SDK}/jws.py",
             'key.verify(signature, signed.encode("ascii"))', 'signed.encode("ascii")', "test_trust.py::test_own_pool_key"),
    Mutation("so are those under a header in other words", f"{SDK}/jws.py",
             "decoded = _jws().decode_complete(token, key, algorithms=[ALGORITHM])",
             'decoded = _jws().decode_complete(token, key, algorithms=[ALGORITHM], options={"verify_signature": False})',
             "test_trust.py::test_other_words"),
    Mutation("each kind of statement has its own typ", f"{SDK}/jws.py",
             'if decoded["header"].get("typ") != typ:', "if False:", "test_trust.py::test_another_type"),
    Mutation("a signed statement has one spelling", f"{SDK}/jws.py",
             'raw = b64u_decode(signature)', 'raw = base64.urlsafe_b64decode(signature + "==")', "test_trust.py::test_respelt"),
    Mutation("a manifest document has a limit", f"{SDK}/manifest.py",
             "if len(data) > MAX_DOCUMENT:", "if False:", "test_trust.py::test_huge"),
    Mutation("a manifest expires", f"{SDK}/trust.py",
             "if now >= manifest.expires_at:", "if False:", "test_grants.py::test_expired_manifest"),
    Mutation("a signer's time ends", f"{SDK}/trust.py",
             "if now >= statement.expires_at:", "if False:", "test_trust.py::test_signer_past_its_time"),
    Mutation("a change of root is signed by the new one too", f"{SDK}/trust.py",
             "if len(payloads) != 1 or signatures.statement(entry, statement.next_root) is None:", "if len(payloads) != 1:",
             "test_trust.py::test_next_root_that_never_agreed"),
    Mutation("a chain has no gap", f"{SDK}/trust.py",
             '            raise UntrustedRoot("the chain of root statements has a gap', '            continue; ("',
             "test_trust.py::test_own_next_root"),
    Mutation("the pinned root's statement is looked for where it can be", f"{SDK}/trust.py",
             "for index in (*_naming(_claims(chain), pinned), 0):", "for index in range(len(chain)):",
             "test_trust.py::test_foreign_statements"),
    Mutation("what names no root that took over is not verified", f"{SDK}/trust.py",
             "named = _naming(claims[:at], found[-1])", "named = range(at or 0)", "test_trust.py::test_foreign_statements"),
    Mutation("no more changes of root are followed back than an operator makes", f"{SDK}/trust.py",
             "for _ in range(MAX_HANDOVERS):", "while True:", "test_trust.py::test_endless_history"),
    Mutation("versions only rise", f"{SDK}/lineage.py",
             "if candidate.manifest.version < seen.version or not _continues(candidate, seen):",
             "if not _continues(candidate, seen):", "test_trust.py::test_older"),
    Mutation("what was seen is verified anew", f"{SDK}/lineage.py",
             "return _again(seen, candidate.roots[0], now)", "return candidate", "test_trust.py::test_rollback"),
    Mutation("root statements are only added", f"{SDK}/lineage.py",
             "if candidate.manifest.version < seen.version or not _continues(candidate, seen):",
             "if candidate.manifest.version < seen.version:", "test_trust.py::test_a_statement_less"),
    Mutation("the newest manifest seen is remembered", f"{SDK}/memory.py",
             "trusted, self._seen = _decided(decide, self._seen)", "trusted, _ = _decided(decide, self._seen)",
             "test_trust.py::test_older"),
    # the client
    Mutation("a KEM that was not chosen is not used", f"{SDK}/sealing.py",
             "if key.config.kem is kem:", "if True:", "test_trust.py::test_classic_only"),
    Mutation("a key past its time is not sealed to", f"{SDK}/sealing.py",
             "[key for key in pool.keys if key.not_after > self._clock()]", "[*pool.keys]",
             "test_trust.py::test_old_generation"),
    Mutation("an answer of another media type is not read", f"{SDK}/sealed_answer.py",
             'if outer.content_type.partition(";")[0].strip().lower() != MEDIA_TYPE_RESPONSE:', "if False:",
             "test_unsealed.py::test_plain"),
    Mutation("only a 200 is an answer", f"{SDK}/sealing.py",
             "if outer.status != 200:\n            document", "if outer.status >= 300:\n            document",
             "test_unsealed.py::test_other_status"),
    Mutation("absent is None alone", f"{SDK}/arguments.py",
             "    if value is not None:\n        return text(value, name, helps=",
             "    if value:\n        return text(value, name, helps=", "test_asked.py::test_no_token_to_pass_on"),
    Mutation("an absurd correction of the clock is not taken", f"{SDK}/sealing.py",
             "if abs(offset) > MAX_CORRECTION:", "if False:", "test_workers.py::test_clock"),
    Mutation("the clock is corrected once", f"{SDK}/sealing.py",
             "if DATE in call.mended or not self", "if call.attempts > 9 or not self",
             "test_workers.py::test_clock_again"),
    Mutation("an unknown key leads to one retry", f"{SDK}/sealing.py",
             "elif refusal.problem in call.mended or not (yield", "elif call.attempts > 9 or not (yield",
             "test_trust.py::test_unknown_key"),
    Mutation("requests are padded", f"{SDK}/sealing.py",
             'padded_to = request_length if self._shape == "pad" else None', "padded_to = None",
             "test_lengths.py::test_requests"),
    Mutation("records carry whole units", f"{SDK}/padding.py",
             "UNIT: Final = 512", "UNIT: Final = 1", "test_lengths.py::test_records"),
    Mutation("answers fall into buckets", f"{SDK}/padding.py",
             "SMALLEST: Final = 4096", "SMALLEST: Final = 64", "test_lengths.py::test_whole"),
    Mutation("redirects are not followed (sync)", f"{SDK}/connection.py",
             "self._response = outer.send(request, stream=True, follow_redirects=False)",
             "self._response = outer.send(request, stream=True, follow_redirects=True)",
             "test_unsealed.py::test_redirect"),
    Mutation("redirects are not followed (async)", f"{SDK}/connection.py",
             "self._response = await outer.send(request, stream=True, follow_redirects=False)",
             "self._response = await outer.send(request, stream=True, follow_redirects=True)",
             "test_unsealed.py::test_redirect"),
    Mutation("the outer body is read raw", f"{SDK}/connection.py",
             "self._response.aiter_raw()", "self._response.aiter_bytes()", "test_unsealed.py::test_content_coding"),
    Mutation("no cookie is sent", f"{SDK}/dial.py",
             "class NoCookies(CookieJar):", "NoCookies = CookieJar\n\n\nclass Unused(CookieJar):",
             "test_unsealed.py::test_cookie"),
    Mutation("a connection that breaks is a truncated answer", f"{SDK}/outer_errors.py",
             'broke = errors.TruncatedStream("the connection broke', 'broke = errors.NetworkError("the connection broke',
             "test_stream.py::test_break"),
    Mutation("inner headers are taken by allow-list", f"{SDK}/inner.py",
             "if name in ALLOWED_HEADERS)", "if name)", "test_workers.py::test_who"),
    Mutation("fields that say who asks are dropped", f"{SDK}/inner.py",
             "dropped = () if keep_identifying_fields else IDENTIFYING_FIELDS", "dropped = ()", "test_workers.py::test_who"),
    Mutation("an answer has one receipt", f"{SDK}/receipts.py",
             "if len(tokens) != 1:", "if not tokens:", "test_workers.py::test_none_or_two"),
    Mutation("a receipt is for this request", f"{SDK}/receipts.py",
             "if receipt.enc != jws.b64u(digest) or not receipt.final:", "if not receipt.final:",
             "test_workers.py::test_another_request"),
    Mutation("an answer's receipt is final", f"{SDK}/receipts.py",
             "if receipt.enc != jws.b64u(digest) or not receipt.final:", "if receipt.enc != jws.b64u(digest):",
             "test_workers.py::test_not_final"),
    Mutation("a receipt is bounded by what was asked for", f"{SDK}/receipts.py",
             "if receipt.completion_tokens > max_tokens or", "if", "test_workers.py::test_above"),
    Mutation("a receipt agrees with the answer's usage", f"{SDK}/reply.py",
             "if usage != claimed:", "if False:", "test_workers.py::test_other_than_told"),
    Mutation("an audit entry says what was sent", f"{SDK}/audit.py",
             "if members.get(name) != value:", "if False:", "test_records.py::test_another"),
    Mutation("an audit proof is by the gateway's key", f"{SDK}/audit.py",
             "    proof.verify(key)\n", "    pass\n", "test_records.py::test_key"),
    Mutation("an audit entry names whom the token names", f"{SDK}/sealing.py",
             "{**sent, **outer.speaks_for})", "sent)", "test_records.py::test_name"),
    # the worker
    Mutation("a response that is not whole has no final chunk", f"{SDK}/asgi/exchange.py",
             "            if not complete:", "            if False:", "test_asked.py::test_log"),
    Mutation("a worker takes no grant by an expired manifest", NODE,
             "if now >= manifest.expires_at:", "if False:", "test_grants.py::test_withheld"),
    Mutation("a grant is bound to its request", NODE,
             "expected = (self._identity.pool, b64u(digest), work.model)",
             "expected = (self._identity.pool, grant.enc, work.model)", "test_grants.py::test_another_request"),
    Mutation("a grant names its pool", NODE,
             "expected = (self._identity.pool, b64u(digest), work.model)", "expected = (grant.pool, b64u(digest), work.model)",
             "test_grants.py::test_another_pool"),
    Mutation("a grant names its model", NODE,
             "expected = (self._identity.pool, b64u(digest), work.model)",
             "expected = (self._identity.pool, b64u(digest), grant.model)", "test_grants.py::test_another_model"),
    Mutation("a worker grants no shape that it does not have", NODE,
             " or grant.shape not in SHAPES:", ":", "test_grants.py::test_unknown_shape"),
    Mutation("a worker claims a request in the whole pool", NODE,
             "if not await self._claimed(delivery):", "if await self._claimed(delivery) is None:",
             "test_replay.py::test_two_workers"),
    Mutation("a worker remembers what it opened", NODE,
             "if refusal is None and not self._seen.add(digest, now, sent_at(opened)):",
             "if self._seen is None:", "test_replay.py::test_same_worker_wiped"),
    Mutation("a full memory forgets nothing that counts", ADMISSION,
             "if digest in self._digests or len(self._digests) >= self._limit:", "if digest in self._digests:",
             "test_replay.py::test_flood"),
    Mutation("a full memory closes its oldest dates", ADMISSION,
             "            self._forget(oldest)\n            self._open_from = oldest + 1", "            return False",
             "test_replay.py::test_flood_of_dates"),
    Mutation("what is forgotten takes its date along", ADMISSION,
             "            self._open_from = oldest + 1", "            pass", "test_replay.py::test_flood_of_dates"),
    Mutation("dates ahead have a quarter of the memory", ADMISSION,
             " or (second > this + 1 and self._ahead >= self._limit // 4)", "", "test_replay.py::test_flood_of_dates"),
    Mutation("what is refused for its date is not remembered", "sdk/lacre/asgi/sealed.py",
             "if refusal is None:  # only what may run is remembered", "if self._seen is not None:",
             "test_replay.py::test_stale_requests"),
    Mutation("the inside is compared with the grant", NODE,
             "refusal = refusal or inside.check(opened, grant, now)", "pass", "test_grants.py::test_shape"),
    Mutation("the worker's log has no exception's text", NODE,
             "**logs.places(exc.__cause__ or exc)", "error=repr(exc.__cause__)", "test_asked.py::test_log"),
    Mutation("what fails for one pool keeps no other from its turn", "fabric/lacre_fabric/rotation.py",
             "        except (LacreError, OSError) as exc:\n            log.warning",
             "        except ZeroDivisionError as exc:\n            log.warning", "test_credentials.py::test_no_new_keys"),
    Mutation("a request's date is near", ADMISSION,
             "if abs(sent - now) <= DATE_WINDOW and sent >= earliest and (seen is None", "if (True",
             "test_replay.py::test_restarted_too_late"),
    Mutation("a date beyond all numbers is none", ADMISSION,
             "except (ValueError, OverflowError):", "except ValueError:", "test_asked.py::test_dates"),
    Mutation("a path has its normal form", ADMISSION,
             "if _AMBIGUOUS.search(decoded_path(opened.request)) is None:", "if True:", "test_asked.py::test_path_traversal"),
    Mutation("the authority is ours", INSIDE,
             "if (request.scheme, request.authority) != (SCHEME, AUTHORITY):", "if False:", "test_asked.py::test_authority"),
    Mutation("copies of outer headers agree with the grant", INSIDE,
             "if any(value != granted for value in opened.headers(name)):", "if False:", "test_grants.py::test_max_tokens"),
    Mutation("the path is of the action granted", INSIDE,
             "if action_of(request.method, decoded_path(request)) != grant.action:", "if False:",
             "test_asked.py::test_escaped_path"),
    Mutation("the path is compared as the app reads it", INSIDE,
             "if action_of(request.method, decoded_path(request)) != grant.action:",
             'if action_of(request.method, request.path.partition("?")[0]) != grant.action:',
             "test_asked.py::test_escaped_path"),
    Mutation("a request that was delivered before is not begun again", NODE,
             "        if delivery.again:", "        if False:", "test_lost.py::test_one_after_another"),
    Mutation("a call is lost by two workers at most", f"{SDK}/backoff.py",
             "MOST_LOST: Final = 2", "MOST_LOST: Final = 9", "test_lost.py::test_one_after_another"),
    Mutation("a gateway says that a worker may be lost", "gateway/lacre_gateway/mapping.py",
             "    return not isinstance(error, _WORKER_LIVES)", "    return False", "test_lost.py::test_in_mid_answer"),
    Mutation("an answer that ends in order before its end counts as a lost worker", f"{SDK}/backoff.py",
             "    return isinstance(error, TruncatedStream) and not error.cut", "    return False",
             "test_lost.py::test_in_mid_answer"),
    Mutation("breaks of a connection are counted too", f"{SDK}/resume.py",
             "if self._made >= self._sealing.resume or", "if", "test_lost.py::test_as_if_it_had_died"),
    Mutation("each text has a process of its own", "backend/lacre_backend/engine/tokenizer_process.py",
             "        return os.fork()", "        return 0", "test_tokenizer.py::test_recursion"),
    Mutation("a text's CPU time is limited", "backend/lacre_backend/engine/tokenizer_process.py",
             "SECONDS + seconds_per_byte * size)", "3600.0)", "test_tokenizer.py::test_square"),
    Mutation("the grant alone says whose turn it is", "backend/lacre_backend/api/served.py",
             "return NOBODY if call is None or call.fair is None else call.fair", "return NOBODY",
             "test_turns.py::test_salts"),
    Mutation("a step compares so many beginnings", "backend/lacre_backend/engine/scheduler.py",
             "while self._compared < COMPARED and any(", "while any(", "test_turns.py::test_alike"),
    Mutation("a model has slots of its own", "fabric/lacre_fabric/slots.py",
             "self._each = {model: min(given.get(model, total), total) for model in models}",
             "self._each = dict.fromkeys(models, total)", "test_turns.py::test_other_model"),
    Mutation("a request weighs as many as its choices", "backend/lacre_backend/api/app.py",
             "call.weigh(request.n)", "call.weigh(1)", "test_turns.py::test_choices"),
    Mutation("pseudonyms change with the hour", "gateway/lacre_gateway/fairness.py",
             "hour = str(int(now // HOUR))", 'hour = ""', "test_turns.py::test_linked"),
    Mutation("a grant has two pseudonyms", "fabric/lacre_fabric/grants.py",
             "if len(pseudonyms) != 2 or not all(map(_PSEUDONYM.fullmatch, pseudonyms)):", "if False:",
             "test_turns.py::test_no_pseudonyms"),
    Mutation("output tokens stay below the grant", "backend/lacre_backend/api/ceilings.py",
             "if each * request.n > call.max_tokens or allowed < 1:", "if False:",
             "test_asked.py::test_more_tokens"),
    Mutation("the model asked for is the one granted", "backend/lacre_backend/api/ceilings.py",
             "if call.model is not None and call.model != request.model:", "if False:", "test_asked.py::test_another_model"),
    Mutation("the prompt stays below the grant", "backend/lacre_backend/api/ceilings.py",
             "if call is not None and call.max_prompt_tokens is not None and n_prompt > call.max_prompt_tokens:", "if False:",
             "test_asked.py::test_more_prompt"),
    Mutation("a step waits for no mask that is late", "backend/lacre_backend/engine/masks.py",
             "return self._ready.wait(seconds if self.cost < GRACE else 0)", "return self._ready.wait()",
             "test_grammars.py::test_slow_masks"),
    Mutation("a limit of the masks is an error", "backend/lacre_backend/engine/masks.py",
             "if matcher.is_error():  # the mask would then only let the answer end", "if False:",
             "test_grammars.py::test_limits_of_masks"),
    Mutation("the remainders of a request's schemas are counted", "backend/lacre_backend/api/schema.py",
             "if self._remainders > MAX_REMAINDERS:", "if False:", "test_grammars.py::test_remainders"),
    Mutation("a keyword that is not the standard's is refused", "backend/lacre_backend/api/schema_cases.py",
             "        if self.strict:  # else", "        if False:  # else", "test_grammars.py::test_options_inside"),
    Mutation("a body holds so many values", "backend/lacre_backend/api/parsed.py",
             "if count > MAX_VALUES:", "if False:", "test_asked.py::test_many_values"),
    Mutation("a caller has one salt", "backend/lacre_backend/api/exchange.py",
             "if len(values) > 1 or len(values[0]) > MAX_HEADER:", "if False:", "test_asked.py::test_salts"),
    # the message server
    Mutation("claims take no time to live", "fabric/lacre_fabric/layout.py",
             "allow_msg_ttl=False,", "allow_msg_ttl=True,", "test_credentials.py::test_claims_fill"),
    Mutation("a bucket holds so many entries", "fabric/lacre_fabric/layout.py",
             "max_msgs=bounds.messages,", "max_msgs=-1,", "test_credentials.py::test_claims_fill"),
    Mutation("a claim is written once", "fabric/lacre_fabric/layout.py",
             "return bucket.evolve(discard_new_per_subject=True)", "return bucket",
             "test_credentials.py::test_claim_again"),
    Mutation("an order is proven", "fabric/lacre_fabric/orders.py",
             "return key is None or hmac.compare_digest(", "return True or hmac.compare_digest(",
             "test_credentials.py::test_orders"),
    Mutation("a gateway proves orders of its own requests", "fabric/lacre_fabric/orders.py",
             'hmac.digest(password.encode(), b"lacre orders", hashlib.sha256)', "bytes(32)",
             "test_credentials.py::test_deputy"),
    Mutation("a gateway writes its own part of the budgets", "fabric/lacre_fabric/roles.py",
             "subjects.budgets_of(credential.name),", '"$KV.budgets.>",', "test_credentials.py::test_budgets"),
    Mutation("a gateway revokes in its own name", "fabric/lacre_fabric/roles.py",
             "subjects.revocation(credential.name),", 'subjects.revocation("*"),',
             "test_credentials.py::test_revocations"),
    Mutation("a connection has so many subscriptions", "fabric/lacre_fabric/accounts.py",
             "WORKER_SUBSCRIPTIONS: Final = 2 * MAX_SLOTS + 24", "WORKER_SUBSCRIPTIONS: Final = -1",
             "test_credentials.py::test_subscriptions"),
    Mutation("each gateway has an account", "fabric/lacre_fabric/roles.py",
             'return f"GATEWAY_{gateway_id}"', 'return "GATEWAY_" + gateway_id[:0]',
             "test_credentials.py::test_gateways_connections"),
    Mutation("a worker's messages are small", "fabric/lacre_fabric/accounts.py",
             "    return Limits(_OVERLAP * MAX_WORKERS * len(regions), WORKER_SUBSCRIPTIONS, WORKER_PAYLOAD)",
             "    return Limits(_OVERLAP * MAX_WORKERS * len(regions), WORKER_SUBSCRIPTIONS, MAX_PAYLOAD)",
             "test_credentials.py::test_large"),
    Mutation("a connection that floods is cut off", "fabric/lacre_fabric/floods.py",
             "            await self._cut_off(connection, rates)\n", "",
             "test_credentials.py::test_cut_off"),
    Mutation("the warden may end a connection", "fabric/lacre_fabric/roles.py",
             "GUARD: Final = (CONNECTIONS, KICK)", "GUARD: Final = (CONNECTIONS,)", "test_credentials.py::test_cut_off"),
    # the fabric's formats
    Mutation("a grant expires", "fabric/lacre_fabric/grants.py",
             "if now >= grant.exp or grant.iat > now + MAX_SKEW:", "if grant.iat > now + MAX_SKEW:",
             "test_grants.py::test_late"),
    Mutation("frames are counted", "fabric/lacre_fabric/inbound.py",
             "if frame.sequence != self._next:", "if False:", "test_frames.py::test_drop"),
    Mutation("a gateway is bound to the first attempt", "fabric/lacre_fabric/inbound.py",
             "if self._over or (self._bound is not None and frame.attempt != self._bound):", "if self._over:",
             "test_frames.py::test_another_attempt"),
    Mutation("what waits to be read is bounded", "fabric/lacre_fabric/inbound.py",
             "if self._pending_bytes > 2 * CREDIT or len(self._frames) + self._beats >= MAX_PENDING_FRAMES:", "if False:",
             "test_frames.py::test_flood"),
    Mutation("credit never runs ahead", "fabric/lacre_fabric/outbound.py",
             "self._consumed = max(self._consumed, min(consumed, self._sent))",
             "self._consumed = max(self._consumed, consumed)",
             "test_frames.py::test_credit"),
    Mutation("the queue takes a digest once", "fabric/lacre_fabric/memory.py",
             "if work.digest in self._hub.published:", "if False:", "test_replay.py::test_at_the_gateway"),
    # the listener
    Mutation("a head is bounded before it is whole", HTTP1,
             "if len(buffer) + self._blank > MAX_HEAD:", "if False:", "test_heads.py::test_endless"),
    Mutation("a head has a bounded number of fields", HTTP1,
             "if len(lines) > MAX_FIELDS:", "if False:", "test_heads.py::test_fields"),
    Mutation("what is held for nobody is bounded", LISTENING,
             "while self._held > self.held:", "while False:", "test_heads.py::test_held"),
    Mutation("an address has a bounded number of connections", LISTENING,
             "if len(own) > self.per_address:", "if False:", "test_heads.py::test_one_address"),
    Mutation("a handshake takes a place", "gateway/lacre_gateway/handshakes.py",
             "terms.door.enter(self, address)", "pass", "test_heads.py::test_handshakes"),
    Mutation("a trailer is no field: the reader is ours, not the server's", "gateway/lacre_gateway/listening.py",
             "made = GatheringProtocol(config,", "made = GatheringProtocol.__mro__[2](config,", "test_heads.py::test_trailer"),
    Mutation("a body has one length", HTTP1,
             'if lengths or version == "1.0":', 'if version == "1.0":', "test_heads.py::test_smuggle"),
    Mutation("there is one transfer coding", HTTP1,
             'if [coding.lower() for coding in codings] != [b"chunked"]:', 'if not codings[-1].endswith(b"chunked"):',
             "test_heads.py::test_coding"),
    Mutation("a path outside has its normal form", HTTP1,
             'if _PATH.fullmatch(path) is None or _AMBIGUOUS.search(path.replace(b"%2F", b"/")):',
             "if _PATH.fullmatch(path) is None:", "test_heads.py::test_path"),
    Mutation("one request is read at a time", LISTENING,
             "while not self._refused and not (self._busy and self._reader.between) and (event := self._reader.next()):",
             "while not self._refused and (event := self._reader.next()):", "test_heads.py::test_ahead"),
    # the gateway
    Mutation("nobody is told to send what is refused", "gateway/lacre_gateway/exchange.py",
             "waits = self.fields.expects() and not self._asked", "waits = False", "test_bodies.py::test_nobody"),
    Mutation("an administrator is known before the body is read", "gateway/lacre_gateway/admin.py",
             "_routes: Final = APIRouter(route_class=_Guarded)", "_routes: Final = APIRouter()", "test_bodies.py::test_admin"),
    Mutation("a body of the admin API is bounded", "gateway/lacre_gateway/admin.py",
             "if len(body) + len(piece) > MAX_BODY:", "if False:", "test_bodies.py::test_admin_long"),
    Mutation("policy decides before the body is read", "gateway/lacre_gateway/relay.py",
             "first = MAX_HEADER if declared is not None else MAX_SEALED_REQUEST + 1", "first = MAX_SEALED_REQUEST + 1",
             "test_bodies.py::test_denied"),
    Mutation("a caller's bodies have a bounded number of bytes", "gateway/lacre_gateway/limits.py",
             "if self._of[subject] + size > self._each:", "if False:", "test_bodies.py::test_bytes"),
    Mutation("refusals are charged", "gateway/lacre_gateway/throttle.py",
             "if met is not None:", "if False:",
             "test_bodies.py::test_refusals"),
    Mutation("an outer header appears once", "gateway/lacre_gateway/outer.py",
             "if name in self.repeated:", "if False:", "test_outside.py::test_twice"),
    Mutation("there is one media type", "gateway/lacre_gateway/outer.py",
             'if media_type != MEDIA_TYPE_REQUEST.encode() or b"content-encoding" in self.values:', "if False:",
             "test_outside.py::test_clear"),
    Mutation("policies decide", "gateway/lacre_gateway/relay.py",
             "if not decision.allowed:", "if False:", "test_outside.py::test_policy"),
    Mutation("a gateway knows each key's time", "gateway/lacre_gateway/manifest.py",
             " and now < key.not_after)", ")", "test_outside.py::test_old_generation"),
    Mutation("a worker says what is a worker's to say", "gateway/lacre_gateway/mapping.py",
             "self.problem = problem if problem in _FROM_WORKERS else problems.WORKER_LOST",
             "self.problem = problem or problems.WORKER_LOST", "test_frames.py::test_problem"),
    Mutation("a request is settled by the pool's receipts", "gateway/lacre_gateway/settlement.py",
             'receipt = Receipt.verify(token.decode("ascii", "replace"), claim.receipt_key)',
             "receipt = Receipt(**__import__('jwt').decode(token, options={'verify_signature': False}))",
             "test_frames.py::test_forged_receipt"),
    Mutation("a request is settled by its own receipts", "gateway/lacre_gateway/settlement.py",
             "if receipt.enc != claim.enc:", "if False:", "test_frames.py::test_another_receipt"),
    Mutation("a request is settled below its reservation", "gateway/lacre_gateway/settlement.py",
             "if not within or receipt.cached_tokens > receipt.prompt_tokens:", "if False:",
             "test_workers.py::test_bill_above"),
    # the connection to NATS
    Mutation("what a message raises ends with it", f"{FABRIC}/nats_client.py",
             "        except Exception as exc:  # noqa: BLE001 - a peer's message must not end",
             "        except ZeroDivisionError as exc:  # a peer's message must not end", "test_nats.py::test_subject"),
    Mutation("lines are split at spaces alone", f"{FABRIC}/nats_protocol.py",
             r'rb"MSG ([^ \n]+) ([0-9]{1,18}) (?:([^ \n]+) )?()(', r'rb"MSG (\S+)\s([0-9]{1,18})\s(?:(\S+)\s)?()(',
             "test_nats.py::test_other_subscription"),
    Mutation("a frame's headers are read whatever their bytes", f"{FABRIC}/frames.py",
             'block.decode("utf-8", "replace")', "block.decode()", "test_nats.py::test_headers_to_the_gateway"),
    Mutation("a message whose headers cannot be read comes without them", f"{FABRIC}/nats_client.py",
             "        except InvalidMessage as exc:\n            self._unusable",
             "        except ZeroDivisionError as exc:\n            self._unusable", "test_nats.py::test_headers"),
    Mutation("a worker's slots are bounded", f"{FABRIC}/presence.py",
             "if count > MAX_SLOTS:", "if False:", "test_nats.py::test_count"),
    Mutation("a pool's workers are bounded", f"{FABRIC}/presence.py",
             "if len(self._nodes) >= MAX_NODES or", "if", "test_nats.py::test_crowd"),
    Mutation("words about requests of nobody are bounded", f"{FABRIC}/nats_pool.py",
             "if request in self._told or len(self._told) >= MAX_STRAY:", "if request in self._told:",
             "test_nats.py::test_to_nobody"),
    Mutation("what is too long is dropped as it arrives", f"{FABRIC}/nats_protocol.py",
             "if size > self._keep:", "if False:", "test_nats.py::test_too_long"),
    Mutation("what has not begun is looked for", f"{FABRIC}/nats_pool.py",
             '            log.warning("fabric.pool_reconnected", pool=self.pool)\n        self.look_soon()',
             '            log.warning("fabric.pool_reconnected", pool=self.pool)', "test_nats.py::test_cut"),
    Mutation("a connection that is silent is a lost one", f"{FABRIC}/nats_client.py",
             "if silent > MAX_SILENT or", "if", "test_nats.py::test_still"),
    # background work
    Mutation("what is left of an answer is cancelled", "sdk/lacre/tasks.py",
             "        task.cancel()\n    await settle(", "        pass\n    await settle(",
             "test_leaving.py::test_stalled_at_a_service"),
    Mutation("an answer ends with its request", NODE,
             "await tasks.end(streaming, beating, withdrawn, limit=_ANSWER_END, expected=(_Replayed,))", "pass",
             "test_leaving.py::test_stalled_at_a_worker"),
    # issuers
    Mutation("the members of a key are text", "gateway/lacre_gateway/keyset.py",
             "if not isinstance(member[name], str) or len(member[name]) > MAX_MEMBER:", "if False:",
             "test_issuers.py::test_odd_members"),
    Mutation("a failed look is followed by another", "gateway/lacre_gateway/remote_keys.py",
             "self._look_at = time.monotonic() + min(timing.patience,", "self._look_at = math.inf + min(timing.patience,",
             "test_issuers.py::test_odd_answers"),
    # claims
    Mutation("groups that are elsewhere are not none", "gateway/lacre_gateway/claims.py",
             "if not self.elsewhere:", "if False:", "test_claims.py::test_groups_elsewhere"),
    Mutation("a name shows as it is", "gateway/lacre_gateway/claims.py",
             "return value.isprintable() or not any(map(_is_unreadable, value))", "return True",
             "test_claims.py::test_name_that_shows_another"),
    Mutation("a token names its tenant", "gateway/lacre_gateway/issuers.py",
             "default_tenant=issuer.default_tenant,", "", "test_claims.py::test_no_tenant"),
)  # fmt: skip


@contextmanager
def copy() -> Iterator[Path]:
    """The tree, as far as the tests need it, in a place of its own."""
    with tempfile.TemporaryDirectory(prefix="lacre-mutants-") as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        yield Path(folder)


def run(tree: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """The tests of this folder that are named, on the code in `tree`."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(tree / room) for room in ROOMS),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    names = [f"tests/hostile/{test}" for test in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--timeout={LIMIT}", *names]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=tree, env=environment, timeout=300)


def caught(tree: Path, mutation: Mutation) -> bool:
    """Whether the mutation's test fails on it. A test that could not even be collected proves nothing."""
    path = tree / mutation.file
    good = path.read_text()
    path.write_text(good.replace(mutation.old, mutation.new))
    try:
        done = run(tree, mutation.test)
    finally:
        path.write_text(good)
    failed = (f"FAILED tests/hostile/{mutation.test}", "plaintext left the process")
    return done.returncode == 1 and any(sign in done.stdout for sign in failed)


def main() -> int:
    """Prints the table; the status says whether every mutation was caught."""
    survivors = 0
    with copy() as tree:
        sound = run(tree, *sorted({mutation.test for mutation in MUTATIONS}))
        if sound.returncode != 0:
            print(sound.stdout[-2000:], "the tests fail before anything was changed", sep="\n")
            return 1
        print("| defence taken away | in | caught by | seconds |\n|---|---|---|---|")
        for mutation in MUTATIONS:
            began = time.monotonic()
            found = caught(tree, mutation)
            survivors += not found
            verdict = f"`{mutation.test}`" if found else "**nothing**"
            print(f"| {mutation.defence} | `{mutation.file}` | {verdict} | {time.monotonic() - began:.1f} |", flush=True)
    print(f"\n{len(MUTATIONS) - survivors} of {len(MUTATIONS)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
