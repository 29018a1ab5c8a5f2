"""What the console's calls answer; its pages show the same."""

from __future__ import annotations

from lacre_gateway.admin.reports import Report


class WorkerReport(Report):
    """draining: it takes no more work. Tokens since its start, as it says. tokens_per_second: over the last minute.

    version: of its program; empty if it does not say. drained: it takes no work because a gateway ordered so. hears: whether it
    receives such orders.
    """

    pool: str
    region: str
    node: str
    models: list[str]
    draining: bool
    busy: int
    free: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    tokens_per_second: float | None
    version: str = ""
    drained: bool = False
    hears: bool = False


class ServedModelReport(Report):
    """A model of the manifest. sha256: of the files that may be served as it. workers: those that take work for it now."""

    pool: str
    model: str
    sha256: list[str]
    context: int | None
    max_output: int | None
    workers: int


class WorkersReport(Report):
    workers: list[WorkerReport]
    models: list[ServedModelReport]


class MinuteReport(Report):
    """at: its beginning, in seconds since the epoch. half_ms, most_ms: of the answered requests, the milliseconds in which half
    of them, and 95 %, had their first byte.
    """

    at: int
    answered: int
    refused: int
    failed: int
    half_ms: float | None
    most_ms: float | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queued: int
    busy: int
    slots: int
    workers: int


class MinutesReport(Report):
    """The minutes of the last 24 hours, of this gateway process alone."""

    minutes: list[MinuteReport]


class RequestReport(Report):
    """A request of the audit log, or a call of the admin API (`kind` is `admin`). Times in seconds since the epoch.

    policies: the rules that decided. exceeded: the limit for which a budget refused it. problem: that the client got. outcome:
    None while it is under way. money: in micro-units. log, index: of its entry. number: for the next page.
    """

    number: int
    kind: str
    request_id: str
    log: str
    index: int
    time: float
    subject: str
    tenant: str
    issuer: str
    address: str
    pool: str | None
    model: str | None
    action: str
    target: str | None
    plan: str | None
    shape: str | None
    kem: str | None
    max_tokens: int | None
    sealed_bytes: int | None
    decision: str
    policies: list[str]
    policy_set: str
    outcome: str | None
    status: int | None
    problem: str | None
    exceeded: str | None
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    duration: float | None
    money: int | None
    unreceipted: bool | None


class RequestsReport(Report):
    """The newest first. next: `before` of the next page; None on the last one. indexed: how many entries of the newest log were
    read for this; entries: how many it has. fault: why it cannot be read.
    """

    requests: list[RequestReport]
    next: int | None
    indexed: int
    entries: int
    fault: str | None


class VoiceReport(Report):
    """What one rule says of a question. applies: None if that depends on what the question leaves open."""

    rule: str
    effect: str
    applies: bool | None
    in_scope: bool
    failed: bool
    needs: list[str]
    text: str


class ExplainedReport(Report):
    """allowed: None if it depends on `missing`. deciding: the rules that decide. policy_set: that decided now."""

    allowed: bool | None
    deciding: list[str]
    missing: list[str]
    rules: list[VoiceReport]
    policy_set: str


class RequestDetail(Report):
    """groups, scopes: of its token. limits: that it was charged to. now: the decision of the rules that are in force now.

    They may be others than then. None if this version cannot ask their question.
    """

    request: RequestReport
    groups: list[str]
    scopes: list[str]
    limits: list[str]
    reserved_prompt_tokens: int | None
    reserved_tokens: int | None
    reserved_money: int | None
    now: ExplainedReport | None


class RuleReport(Report):
    name: str
    effect: str
    annotations: dict[str, str]
    text: str


class PolicyReport(Report):
    """The rules in force. refused: why newer ones on the disk are not, in a word."""

    policy_set: str
    digest: str
    since: float
    reloads: int
    refused: str | None
    refused_file: str | None
    rules: list[RuleReport]
    cases: int
    zone: str
    plans: list[str]


class ReplayedReport(Report):
    """A decision that other rules would make differently."""

    request_id: str
    time: float
    subject: str
    tenant: str
    action: str
    resource: str
    was: str
    becomes: str
    by: list[str]


class ReplayReport(Report):
    """decided: how many of the log's newest decisions were made again. changes: those that differ, up to 200; changed: how many
    do. unsure: how many cannot be made again.
    """

    decided: int
    changed: int
    unsure: int
    changes: list[ReplayedReport]
    policy_set: str


class KeyReport(Report):
    """A public key that the manifest or the gateway uses. what: `pool`, `receipts`, `grants` or `certificate`.

    until: seconds since the epoch; None: as long as the manifest. held: how many live workers announce that they have it, or
    accept what it signs; missing: those that do not. None, and empty, if workers announce nothing of it.
    """

    what: str
    of: str
    key: str
    suite: str
    state: str
    until: float | None
    held: int | None = None
    missing: tuple[str, ...] = ()


class UnlistedKeyReport(Report):
    """A pool's key that the manifest does not list, and the workers that have it: an old one, or one that is not listed yet."""

    pool: str
    key: str
    workers: list[str]


class RotationReport(Report):
    """A rotation that is not over. of: a pool, or `gateways`. waits: for what, in words."""

    what: str
    of: str
    waits: str


class IssuerReport(Report):
    """Whether its keys are known here."""

    issuer: str
    usable: bool


class KeysReport(Report):
    """version, issued_at, expires_at: of the manifest; None without one. unlisted: keys that workers have beside its own.

    gateway: the one that was asked. Its certificates, its issuers and `signs`, the key that signs its grants, are its own.
    Gateways announce none of these, so each must be asked.
    """

    gateway: str
    signs: str
    version: int | None
    issued_at: float | None
    expires_at: float | None
    keys: list[KeyReport]
    issuers: list[IssuerReport]
    unlisted: tuple[UnlistedKeyReport, ...] = ()
    rotations: tuple[RotationReport, ...] = ()


class AuditReport(Report):
    """origin, entries, writable: of the newest log. checkpoint: as a signed note; keep it elsewhere. key: that verifies it."""

    origin: str
    entries: int
    logs: int
    writable: bool
    checkpoint: str
    key: str


class VerifiedReport(Report):
    """holds: whether every byte agrees with the signed tree. words: the verdict. seconds: it took."""

    holds: bool
    words: str
    entries: int
    requests: int
    under_way: int
    logs: int
    erased: int
    seconds: float


class UseReport(Report):
    """day: as 2026-11-30, in UTC."""

    day: str
    model: str
    subject: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    money: int


class TenantUseReport(Report):
    """What a tenant's users did, by day, model and user, as the audit log of this gateway has it."""

    tenant: str
    days: int
    uses: list[UseReport]
