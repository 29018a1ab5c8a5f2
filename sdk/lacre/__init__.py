"""Lacre: sealed access to self-hosted language models. The gateway knows who, never what; the worker knows what, never who.

>>> import lacre
>>> with lacre.Client() as client:
...     print(client.chat("Name three seas.").text)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lacre._version import __version__
from lacre.chat.attribution import Attribution, ExplainedPart, Lens, LensToken, ScoredToken
from lacre.chat.choices import (
    Choice,
    Finished,
    ReasoningDelta,
    RefusalDelta,
    StreamEvent,
    TextDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
)
from lacre.chat.reply import Reply, TokenUsage
from lacre.chat.stream_sync import ChatStream
from lacre.chat.texts import EmbedReply, RankedText, RerankReply, TokenizeReply
from lacre.chat.told import info
from lacre.client import BASE_URL, ORIGIN, Client
from lacre.errors import (
    AlreadyUsedError,
    ApiError,
    DestinationError,
    Expired,
    Forbidden,
    GaveUp,
    InvalidAudit,
    InvalidMessage,
    InvalidProof,
    InvalidReceipt,
    InvalidSignature,
    LacreError,
    MessageTooLarge,
    NetworkError,
    NewerFormat,
    OpenError,
    ProtocolError,
    RateLimited,
    RefusedError,
    Rollback,
    SettingsError,
    StreamBroken,
    TimedOut,
    TruncatedStream,
    Unauthenticated,
    Unavailable,
    UnknownKeyId,
    Unreachable,
    UnsealedResponse,
    UnsupportedSuite,
    UntrustedRoot,
    UsageError,
    VerificationError,
    WrongModel,
)
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.exchange_info import Part
from lacre.evidence.receipts import Receipt
from lacre.evidence.recount import Recount
from lacre.evidence.verification import Verification
from lacre.exchange.own_usage import OwnUsage, UsedLimit
from lacre.jose.dpop import ProofKey
from lacre.transport.oauth import ClientCredentials
from lacre.trust.chain import ConnectionString
from lacre.trust.manifest_store import VersionFile, VersionMemory
from lacre.wire.header import Kem

if TYPE_CHECKING:
    from lacre.chat.stream_async import AsyncChatStream
    from lacre.client import AsyncClient
    from lacre.openai import AsyncOpenAI, OpenAI

__all__ = [
    "BASE_URL",
    "ORIGIN",
    "AlreadyUsedError",
    "ApiError",
    "AsyncChatStream",
    "AsyncClient",
    "AsyncOpenAI",
    "Attribution",
    "AuditProof",
    "ChatStream",
    "Choice",
    "Client",
    "ClientCredentials",
    "ConnectionString",
    "DestinationError",
    "EmbedReply",
    "Expired",
    "ExplainedPart",
    "Finished",
    "Forbidden",
    "GaveUp",
    "InvalidAudit",
    "InvalidMessage",
    "InvalidProof",
    "InvalidReceipt",
    "InvalidSignature",
    "Kem",
    "LacreError",
    "Lens",
    "LensToken",
    "MessageTooLarge",
    "NetworkError",
    "NewerFormat",
    "OpenAI",
    "OpenError",
    "OwnUsage",
    "Part",
    "ProofKey",
    "ProtocolError",
    "RankedText",
    "RateLimited",
    "ReasoningDelta",
    "Receipt",
    "Recount",
    "RefusalDelta",
    "RefusedError",
    "Reply",
    "RerankReply",
    "Rollback",
    "ScoredToken",
    "SettingsError",
    "StreamBroken",
    "StreamEvent",
    "TextDelta",
    "TimedOut",
    "TokenLogprob",
    "TokenUsage",
    "TokenizeReply",
    "ToolCall",
    "ToolCallDelta",
    "TruncatedStream",
    "Unauthenticated",
    "Unavailable",
    "UnknownKeyId",
    "Unreachable",
    "UnsealedResponse",
    "UnsupportedSuite",
    "UntrustedRoot",
    "UsageError",
    "UsedLimit",
    "Verification",
    "VerificationError",
    "VersionFile",
    "VersionMemory",
    "WrongModel",
    "__version__",
    "info",
]


# What a program imports at its first use: the async half costs a twentieth of the whole import, `openai` half a second.
_LATER = {
    "AsyncChatStream": "lacre.chat.stream_async",
    "AsyncClient": "lacre.client",
    "AsyncOpenAI": "lacre.openai",
    "OpenAI": "lacre.openai",
}


def __getattr__(name: str) -> object:
    """Imports the names of `_LATER`. `OpenAI` and `AsyncOpenAI` need an extra."""
    if name in _LATER:
        value: object = getattr(import_module(_LATER[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
