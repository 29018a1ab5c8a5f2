"""Defences of the gateway: its listener, its books, its issuers."""

from __future__ import annotations

from typing import Final

from hostile.mutation import Mutation

MUTATIONS: Final = Mutation.of(
    # the listener
    ("heads: endless", "a head is bounded before it is whole", "lacre.runtime.http1:RequestReader._check_begun",
     "if len(buffer) + self._blank > MAX_HEAD:"),
    ("heads: fields", "a head has a bounded number of fields", "lacre.runtime.http1:parse_head", "if len(lines) > MAX_FIELDS:"),
    ("heads: held", "bytes that no app asked for are bounded", "lacre.runtime.listening:Door.holds",
     "while self._held > self.held:", "while False:"),
    ("heads: one_address", "an address has a bounded number of connections", "lacre.runtime.listening:Door.enter",
     "if len(own) > self.per_address:"),
    ("heads: handshakes", "a handshake counts as a connection", "lacre_gateway.http.handshakes:Handshake.__init__",
     "terms.door.enter(self, address)", ""),
    ("heads: trailer", "trailers do not count as fields", "lacre_gateway.http.server:Server.startup.connection",
     "GatheringProtocol", "GatheringProtocol.__mro__[2]"),
    ("heads: smuggle", "a body has one length", "lacre.runtime.http1:_length", 'if lengths or version == "1.0":',
     'if version == "1.0":'),
    ("heads: coding", "there is one transfer coding", "lacre.runtime.http1:_length",
     'if [coding.lower() for coding in codings] != [b"chunked"]:', 'if not codings[-1].endswith(b"chunked"):'),
    ("heads: path", "a path outside has its normal form", "lacre.runtime.http1:_check_path",
     'if _PATH.fullmatch(path) is None or _AMBIGUOUS.search(path.replace(b"%2F", b"/")):', "if _PATH.fullmatch(path) is None:"),
    ("heads: ahead", "one request is read at a time", "lacre.runtime.listening:BoundedProtocol._advance",
     "self._busy and self._reader.between", "False"),
    # the gateway
    ("heads: nobody", "a refused client is not asked for its body", "lacre_gateway.http.exchange:Exchange.refuse",
     "waits = self.fields.expects() and not self._asked", "waits = False"),
    ("heads: admin", "an administrator is known before the body is read", "lacre_gateway.admin.api",
     "_routes: Final = APIRouter(route_class=_Guarded)", "_routes: Final = APIRouter()"),
    ("heads: admin_long", "a body of the admin API is bounded", "lacre_gateway.admin.api:_body",
     "if len(body) + len(piece) > MAX_BODY:"),
    ("heads: denied", "policy decides before the body is read", "lacre_gateway.relay.relay:_permitted",
     "first = MAX_HEADER if declared is not None else MAX_SEALED_REQUEST + 1", "first = MAX_SEALED_REQUEST + 1"),
    ("heads: bytes", "a caller's bodies have a bounded number of bytes", "lacre_gateway.budget.in_flight:BodyBytes.check",
     "if self._of[subject] + size > self._each:"),
    ("heads: refusals", "refusals are charged", "lacre_gateway.auth.throttle:RefusalThrottle.check", "if met is not None:"),
    ("heads: twice", "an outer header appears once", "lacre_gateway.http.headers:Fields._required",
     "if name in self.repeated:"),
    ("heads: clear", "there is one media type", "lacre_gateway.http.headers:Fields.check_media",
     'if media_type != MEDIA_TYPE_REQUEST.encode() or b"content-encoding" in self.values:'),
    ("heads: policy", "policies decide", "lacre_gateway.relay.relay:_permitted", "if not decision.allowed:"),
    ("heads: old_generation", "a gateway knows each key's end", "lacre_gateway.relay.pools:pool_for", "now < key.not_after",
     "True"),
    ("frames: problem", "a worker may report only certain problems", "lacre_gateway.relay.failures:WorkerRefused.__init__",
     "self.problem = problem if problem in _FROM_WORKERS else problems.WORKER_LOST",
     "self.problem = problem or problems.WORKER_LOST"),
    ("frames: forged_receipt", "a request is settled by the pool's receipts", "lacre_gateway.budget.settlement:judge",
     'receipt = Receipt.verify(token.decode("ascii", "replace"), claim.receipt_key)',
     "receipt = Receipt(**__import__('jwt').decode(token, options={'verify_signature': False}))"),
    ("frames: another_receipt", "a request is settled by its own receipts", "lacre_gateway.budget.settlement:judge",
     "if receipt.enc != claim.enc:"),
    ("workers: bill_above", "a request is settled below its reservation", "lacre_gateway.budget.settlement:judge",
     "if not within or receipt.cached_tokens > receipt.prompt_tokens:"),
    # issuers
    ("issuers: odd_members", "the members of a key are text", "lacre_gateway.auth.jwks:_bind",
     "if not isinstance(member[name], str) or len(member[name]) > MAX_MEMBER:"),
    ("issuers: odd_answers", "a failed look is followed by another", "lacre_gateway.auth.jwks_remote:RemoteKeys._failed",
     "time.monotonic()", "math.inf"),
    # claims
    ("issuers: groups_elsewhere", "missing groups are not the same as no groups",
     "lacre_gateway.auth.claims:ClaimNames.principal", "if not self.elsewhere:"),
    ("issuers: name_that_shows_another", "a name is displayed as it is", "lacre_gateway.auth.claims:is_name",
     "return value.isprintable() or not any(map(_is_unreadable, value))", "return True"),
    ("issuers: no_tenant", "a token names its tenant", "lacre_gateway.auth.issuers:trusted",
     "default_tenant=issuer.default_tenant", ""),
    # audit logs
    ("records: link", "a log begins with the end of the one before", "lacre_gateway.audit.story:Story._link",
     "if self.before is not None and checkpoint.encode() != self.before:"),
    ("records: erased_log", "an erasure is recorded", "lacre_gateway.audit.check:_Chain.run",
     "if self._erased is not None and self._story.erased.get(self._erased.origin) != self._erased.size:"),
    ("records: skipping_export", "an export skips only recorded erasures", "lacre_gateway.audit.feed:_Reading.rest",
     "if self.unrecorded:"),
)  # fmt: skip
