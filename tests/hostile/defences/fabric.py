"""Defences of the message server, the fabric's formats and the connection to NATS."""

from __future__ import annotations

from typing import Final

from hostile.mutation import Mutation

MUTATIONS: Final = Mutation.of(
    # the message server
    ("credentials: claims_fill", "a claim cannot set its time to live", "lacre_fabric.nats.streams:_bucket",
     "allow_msg_ttl=False", "allow_msg_ttl=True"),
    ("credentials: claims_fill", "a bucket has a maximum number of entries", "lacre_fabric.nats.streams:_bucket",
     "max_msgs=bounds.messages", "max_msgs=-1"),
    ("credentials: claim_again", "a claim is written once", "lacre_fabric.nats.streams:_claims",
     "return bucket.evolve(discard_new_per_subject=True)", "return bucket"),
    ("credentials: orders", "cancels and credit carry a proof", "lacre_fabric.nats.orders:proven", "key is None", "True"),
    ("credentials: deputy", "a gateway proves orders for its own requests only", "lacre_fabric.nats.orders:OrderKeys.__init__",
     'hmac.digest(password.encode(), b"lacre orders", hashlib.sha256)', "bytes(32)"),
    ("credentials: budgets", "a gateway writes its own part of the budgets", "lacre_fabric.nats.roles:gateway",
     "subjects.budgets_of(credential.name)", '"$KV.budgets.>"'),
    ("credentials: revocations", "a gateway revokes in its own name", "lacre_fabric.nats.roles:gateway",
     "subjects.revocation(credential.name)", 'subjects.revocation("*")'),
    ("credentials: subscriptions", "a connection has a maximum number of subscriptions", "lacre_fabric.nats.accounts",
     "WORKER_SUBSCRIPTIONS: Final = 2 * MAX_SLOTS + 24", "WORKER_SUBSCRIPTIONS: Final = -1"),
    ("credentials: gateways_connections", "each gateway has an account", "lacre_fabric.nats.roles:gateway_account",
     'return f"GATEWAY_{gateway_id}"', 'return "GATEWAY_" + gateway_id[:0]'),
    ("credentials: large", "a worker's messages are small", "lacre_fabric.nats.accounts:_limits", "WORKER_PAYLOAD",
     "MAX_PAYLOAD"),
    ("credentials: cut_off", "a connection that floods is cut off", "lacre_fabric.operate.floods:_Watcher.run",
     "await self._cut_off(connection, rates)", ""),
    ("credentials: cut_off", "the warden's credential may end a connection", "lacre_fabric.nats.roles",
     "GUARD: Final = (CONNECTIONS, KICK, RELOAD)", "GUARD: Final = (CONNECTIONS, RELOAD)"),
    # the fabric's formats
    ("grants: late", "a grant expires", "lacre_fabric.work.grants:Grant.verify",
     "if now >= grant.exp or grant.iat > now + MAX_SKEW:", "if grant.iat > now + MAX_SKEW:"),
    ("frames: drop", "frames are counted", "lacre_fabric.work.gateway_stream:Inbound.put", "if frame.sequence != self._next:"),
    ("frames: another_attempt", "a gateway is bound to the first attempt", "lacre_fabric.work.gateway_stream:Inbound.put",
     "if self._over or (self._bound is not None and frame.attempt != self._bound):", "if self._over:"),
    ("frames: flood", "unread bytes are bounded", "lacre_fabric.work.gateway_stream:Inbound.put",
     "if self._pending_bytes > 2 * CREDIT or len(self._frames) + self._beats >= MAX_PENDING_FRAMES:"),
    ("frames: credit", "credit never runs ahead", "lacre_fabric.work.worker_stream:Outbound.renew",
     "self._consumed = max(self._consumed, min(consumed, self._sent))", "self._consumed = max(self._consumed, consumed)"),
    ("replay: at_the_gateway", "the queue takes a digest once", "parts.memory_fabric:MemoryGateway.dispatch",
     "if work.digest in self._hub.published:"),
    # one site's operator
    ("trust: caught_up", "a replaced signer leads no folder on", "lacre_fabric.operate.catching_up:catch_up",
     "standing = [each for each in known if not any(_supersedes(one, each[1]) for _, one in known)]", "standing = known"),
    # the connection to NATS
    ("nats: subject", "an exception drops only its message", "lacre_fabric.nats.client:DirectClient._taken",
     "except Exception as exc:", "except ZeroDivisionError as exc:"),
    ("nats: other_subscription", "lines are split only at spaces", "lacre_fabric.nats.protocol",
     r'rb"MSG ([^ \n]+) ([0-9]{1,18}) (?:([^ \n]*) )?()([0-9]{1,18})\r\n"',
     r'rb"MSG (\S+)\s([0-9]{1,18})\s(?:(\S*)\s)?()([0-9]{1,18})\r\n"'),
    ("nats: in_a_value", "a message that is written is one message", "lacre_fabric.nats.protocol:encode_publish",
     "if len(f'{subject} {reply}'.split()) != 1 + bool(reply)"
     " or block.count('\\n') + block.count('\\r') != 2 * len(headers) + 4:"),
    ("nats: headers_to_the_gateway", "a frame's headers may have any bytes", "lacre_fabric.work.frames:_fields",
     'block.decode("utf-8", "replace")', "block.decode()"),
    ("nats: headers", "a message with unreadable headers arrives without them",
     "lacre_fabric.nats.client:DirectClient._process_msg", "except InvalidMessage as exc:", "except ZeroDivisionError as exc:"),
    ("nats: count", "a worker's slots are bounded", "lacre_fabric.work.presence:_slots", "if count > MAX_SLOTS:"),
    ("nats: crowd", "a pool's workers are bounded", "lacre_fabric.work.presence:Roster.hear", "len(self._nodes) >= MAX_NODES",
     "False"),
    ("nats: to_nobody", "cancels of unknown requests are limited", "lacre_fabric.nats.pool:_Stray.add",
     "if request in self._told or len(self._told) >= MAX_STRAY:", "if request in self._told:"),
    ("nats: too_long", "oversized messages are dropped as they arrive", "lacre_fabric.nats.protocol:ProtocolReader._line",
     "if size > self._keep:"),
    ("nats: cut", "the gateway looks for requests that have not begun", "lacre_fabric.nats.pool:PoolSide._returned",
     "self.look_soon()", ""),
    ("nats: still", "a silent connection counts as lost", "lacre_fabric.nats.client:DirectClient._ping_interval",
     "silent > MAX_SILENT", "False"),
    ("settling: expired", "a key for MACs has its time", "lacre_fabric.work.settlement_keys:SettlementKeys.of",
     "self._clock() < held.until", "True"),
    ("settling: of_another_gateway", "a key for MACs names its gateway", "lacre_fabric.work.settlement_keys:bound_to",
     "(pool.encode(), gateway.encode())", "(pool.encode(),)"),
)  # fmt: skip
