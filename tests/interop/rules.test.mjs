/** Rules of wire.md that no exchange with an honest gateway shows. `node --test` runs them. */

import { deepStrictEqual as same, ok, rejects, throws } from "node:assert";
import { test } from "node:test";

import {
  ConfigurationError,
  ExpiredError,
  MalformedError,
  NoUsableKeyError,
  RollbackError,
  TooLargeError,
  TruncatedError,
  TrustError,
  UsedError,
} from "../../sdk/javascript/src/errors.js";
import { affinityOf, beginningOf } from "../../sdk/javascript/src/exchange/affinity.js";
import { receiptOf, checkModel, digestsOf } from "../../sdk/javascript/src/evidence/receipts.js";
import { MAX_DOCUMENT, verifyDocument } from "../../sdk/javascript/src/trust/chain.js";
import { parseConnectionString } from "../../sdk/javascript/src/trust/connection.js";
import { chooseKey } from "../../sdk/javascript/src/trust/manifest.js";
import { accept, ProcessMemory } from "../../sdk/javascript/src/trust/memory.js";
import { ordered } from "../../sdk/javascript/src/trust/routes.js";
import { encodeRequest, LIMITS, ResponseReader } from "../../sdk/javascript/src/wire/bhttp.js";
import { ascii, concat, toBase64url, uint } from "../../sdk/javascript/src/wire/bytes.js";
import { KEMS, parseKeyConfiguration, suiteOf } from "../../sdk/javascript/src/wire/keys.js";
import { MAX_SEALED_REQUEST, SealedRequest } from "../../sdk/javascript/src/wire/ohttp.js";
import { varint } from "../../sdk/javascript/src/wire/varint.js";
import { json, jws, newKey } from "./signing.mjs";

const NOW = 1_780_000_000;

// What is signed

const statement = (signer, exp = NOW + 100, next = null) =>
  json({ typ: "lacre-root", signer: toBase64url(signer.raw), exp, next_root: next && toBase64url(next.raw) });
const signed = (payload, ...keys) => keys.map((key) => jws(payload, key, "lacre-root+jwt"));

const configuration = (kemId, size, algorithms = "00010002") =>
  concat([uint(1, 1), uint(kemId, 2), new Uint8Array(size).fill(9), uint(algorithms.length / 2, 2), Buffer.from(algorithms, "hex")]);
const X25519 = configuration(0x0020, 32);
const XWING = configuration(0x647a, 1216);

const [root, newer, signer, stranger] = [newKey(), newKey(), newKey(), newKey()];

function claims(changes = {}, keys = [{ config: toBase64url(XWING), not_after: NOW + 50 }]) {
  const models = { m: { sha256: [], signers: [], later: 1 } };
  const pool = { models, default_model: "m", keys, receipt_key: toBase64url(signer.raw), shapes: ["none"], later: 1 };
  const key = toBase64url(stranger.raw);
  return { iss: "test", ver: 7, iat: NOW, exp: NOW + 100, gateway_key: key, pools: { default: pool }, later: 1, ...changes };
}

const documentOf = (roots, manifest, by = signer) => json({ roots, manifest: jws(manifest, by, "lacre-manifest+jwt"), later: 1 });
const simple = (changes, keys) => documentOf([signed(statement(signer), root)], claims(changes, keys));
const verified = async (document, pin = root) => (await verifyDocument(document, pin.raw, NOW)).manifest;
const refused = (document, why, pin) => rejects(verified(document, pin), TrustError, why);

// Affinity

test("all turns and branches of a conversation begin alike, and others do not", () => {
  const [system, ann, answer] = [{ role: "system", content: "s" }, { role: "user", content: "a" }, { role: "assistant", content: "b" }];
  const first = beginningOf({ messages: [system, ann] });
  same(beginningOf({ messages: [system, ann, answer, { role: "user", content: "c" }] }), first);
  const others = [
    { messages: [system, { role: "user", content: "c" }] },
    { messages: [ann] },
    { messages: [ann], system: "s" },
    { input: "a", instructions: "s" },
  ];
  same(new Set([first, ...others.map(beginningOf)]).size, 5);
  same(beginningOf({ input: "a" }), beginningOf({ input: [ann, answer] }));
  for (const none of [{}, { messages: [] }, { messages: [system] }, { messages: 5 }, { input: null }, { messages: [null] }]) {
    same(beginningOf(none), null);
  }
});

test("an affinity is the value that the Python client sends", async () => {
  same(await affinityOf("00".repeat(16), "p", "m", "beginning"), "RB9wHnaHdKfFrXhXDk3v8Q");
  const others = [["01", "p", "m", "x"], ["00", "q", "m", "x"], ["00", "p", "n", "x"], ["00", "p", "m", "y"], ["00", "p\0m", "", "x"]];
  same(new Set(await Promise.all(others.map((each) => affinityOf(...each)))).size, 5);
});

// Trust

test("connection strings", () => {
  const trust = toBase64url(root.raw);
  const { base, root: pinned } = parseConnectionString(`lacre://gateway.example:8443?trust=${trust}`);
  same([base.origin, toBase64url(pinned)], ["https://gateway.example:8443", trust]);
  for (const host of ["127.0.0.1:1", "localhost", "[::1]:8080", "127.8.9.1"]) {
    parseConnectionString(`lacre+http://${host}?trust=${trust}`);
  }
  parseConnectionString(`lacre://gateway.example/?trust=${trust}&later=1`);
  for (const wrong of [
    `https://a?trust=${trust}`,
    `lacre+http://a?trust=${trust}`,
    `lacre+http://127.0.0.1.example?trust=${trust}`,
    `lacre://u@a?trust=${trust}`,
    `lacre://a/path?trust=${trust}`,
    `lacre://a?trust=${trust}#f`,
    `lacre://a?trust=${trust}&trust=${trust}`,
    `lacre://a?trust=${trust}A`,
    "lacre://a",
  ]) {
    throws(() => parseConnectionString(wrong), ConfigurationError, wrong);
  }
});

test("a manifest verifies", async () => {
  const manifest = await verified(simple());
  const { models, defaultModel } = manifest.pools.get("default");
  same([manifest.ver, [...models.keys()], defaultModel], [7, ["m"], "m"]);
});

test("a chain of roots is followed from the pinned one", async () => {
  const handover = statement(signer, NOW + 100, newer);
  const first = signed(statement(stranger), root);
  const change = signed(handover, root, newer);
  const after = signed(statement(signer), newer);
  const alien = [jws(statement(signer), root, "other+jwt"), jws(statement(signer), root, "lacre-root+jwt", "ES256")];
  for (const roots of [[first, change], [first, change, after], [signed(statement(signer, 1), root), first, change, after]]) {
    same((await verified(documentOf(roots, claims()))).ver, 7);
  }
  same((await verified(documentOf([first, change, after], claims()), newer)).ver, 7, "what was before the pin is passed over");
  same((await verified(documentOf([alien, change], claims()))).ver, 7, "of another alg or typ: by nobody");

  for (const [why, roots] of Object.entries({
    "no statement at all": [],
    "none by the pinned root": [after],
    "a gap": [first, after],
    "the new root did not sign": [signed(handover, root)],
    "the new root signed something else": [[signed(handover, root)[0], signed(statement(signer, NOW + 101, newer), newer)[0]]],
    "the old root again after the change": [change, signed(statement(signer), root)],
    "the last statement has expired": [signed(statement(signer, NOW), root)],
    "only the last statement counts": [signed(statement(signer), root), signed(statement(stranger), root)],
    "an empty entry": [[], change],
    "not text": [[7]],
    "not a token": [["a.b"]],
  })) {
    await refused(documentOf(roots, claims()), why);
  }
});

test("a statement or manifest that is not right is refused", async () => {
  const { next_root: _, ...incomplete } = JSON.parse(Buffer.from(statement(signer)));
  await refused(documentOf([signed(json(incomplete), root)], claims()));
  await refused(documentOf([signed(statement(signer), root)], claims(), stranger));
  const sameKeyOtherTyp = json({ roots: [signed(statement(signer), root)], manifest: jws(claims(), signer, "lacre-root+jwt") });
  await refused(sameKeyOtherTyp);
  for (const changes of [
    { exp: NOW },
    { iat: NOW + 301 },
    { exp: undefined },
    { exp: "1790000000" },
    { ver: 1.5 },
    { ver: -1 },
    { gateway_key: "AA" },
    { pools: [] },
    { pools: { p: {} } },
    ...[
      { models: ["m"] },
      { models: { m: {} } },
      { models: { m: { sha256: ["00"], signers: [] } } },
      { models: { m: { sha256: [], signers: ["A".repeat(64)] } } },
      { default_model: "other" },
      { default_model: null },
      { default_model: undefined },
    ].map((bad) => ({ pools: { default: { ...claims().pools.default, ...bad } } })),
  ]) {
    await refused(simple(changes), JSON.stringify(changes));
  }
  await refused(new Uint8Array(MAX_DOCUMENT + 1));
  await refused(ascii("{"));
});

test("routes of a manifest", async () => {
  const way = { pool: "default", share: 95, later: 1 };
  const { routes } = await verified(simple({ routes: { m: { pools: [way, { pool: "p", model: "n" }], later: 1 } } }));
  const both = [{ pool: "default", model: "m", share: 95 }, { pool: "p", model: "n", share: 0 }];
  same(routes.get("m"), { ways: both, sticky: true });
  same((await verified(simple())).routes.size, 0, "a manifest without routes");
  for (const wrong of [
    [],
    { m: [] },
    { m: {} },
    { m: { pools: [] } },
    { m: { pools: Array.from({ length: 9 }, (_, i) => ({ pool: `p${i}` })) } },
    { m: { pools: [way, way] } },
    { m: { pools: [{}] } },
    { m: { pools: [{ pool: "a b" }] } },
    { m: { pools: [{ pool: "p", model: null }] } },
    { m: { pools: [{ pool: "p", share: -1 }] } },
    { m: { pools: [{ pool: "p", share: 1000001 }] } },
    { m: { pools: [{ pool: "p", share: 0.5 }] } },
    { m: { pools: [way], sticky: 1 } },
    { "": { pools: [way] } },
    Object.fromEntries(Array.from({ length: 257 }, (_, i) => [`r${i}`, { pools: [way] }])),
  ]) {
    await refused(simple({ routes: wrong }), JSON.stringify(wrong).slice(0, 80));
  }
});

test("a draw falls on each pool by its share, and a share that grows moves nobody elsewhere", async () => {
  const ways = [["a", 2], ["b", 0], ["c", 1]].map(([pool, share]) => ({ pool, model: "m", share }));
  const seeds = Array.from({ length: 300 }, (_, i) => uint(i, 32));
  const firsts = async (changed) => Promise.all(seeds.map(async (seed) => (await ordered(changed, seed))[0].pool));
  const before = await firsts(ways);
  const of = (pool) => before.filter((each) => each === pool).length;
  same(of("b"), 0);
  ok(of("a") > 150 && of("a") < 250, `${of("a")} of 300 instead of about 200`);
  const after = await firsts(ways.map((way) => (way.pool === "c" ? { ...way, share: 4 } : way)));
  ok(after.every((pool, i) => pool === before[i] || pool === "c"));
  same((await ordered(ways, seeds[0])).length, 3);
  same((await ordered(ways.map((way) => ({ ...way, share: 0 })), seeds[0]))[0].pool, "a", "without shares, the first has all");
});

test("the newest manifest is remembered", async () => {
  const old = simple({ ver: 7 });
  const memory = new ProcessMemory();
  const taken = async (document, now = NOW, pin = root) => (await accept(document, pin.raw, memory, now)).trusted.manifest.ver;
  same(await taken(old), 7);
  same(await taken(old), 7);
  await rejects(taken(simple({ ver: 7, iat: NOW - 1 })), RollbackError);
  same(await taken(simple({ ver: 9, exp: NOW + 10 })), 9);
  same(await taken(old), 9, "the remembered one is used while it verifies");
  await rejects(taken(old, NOW + 20), RollbackError);
});

test("a chain without the last statement seen is older, whatever its version", async () => {
  const memory = new ProcessMemory();
  const taken = async (document, pin = root) => (await accept(document, pin.raw, memory, NOW)).trusted.manifest.ver;
  const [stolen, replaced] = [signed(statement(stranger), root), signed(statement(signer), root)];
  same(await taken(documentOf([stolen, replaced], claims({ ver: 5 }))), 5);
  same(await taken(documentOf([stolen], claims({ ver: 6 }), stranger)), 5, "by the key that was replaced");
  const change = signed(statement(signer, NOW + 100, newer), root, newer);
  same(await taken(documentOf([stolen, replaced, change], claims({ ver: 7 }))), 7);
  same(await taken(documentOf([stolen, replaced], claims({ ver: 8 }))), 7);
  const later = documentOf([stolen, replaced, change, signed(statement(signer), newer)], claims({ ver: 6 }));
  same(await taken(later, newer), 7, "a pin of the lineage's later root keeps its memory");
  const others = new ProcessMemory();
  same((await accept(documentOf([stolen, replaced], claims({ ver: 9 })), root.raw, others, NOW)).trusted.manifest.ver, 9);
  await rejects(accept(later, newer.raw, others, NOW), RollbackError, "the served chain leads from the remembered root to the pin");
});

test("a chain beside leads a pin that the first chain does not", async () => {
  const lost = [signed(statement(stranger), stranger)];
  const document = json({ roots: lost, beside: [signed(statement(signer), root)], manifest: jws(claims(), signer, "lacre-manifest+jwt") });
  same((await verified(document)).ver, 7);
  await refused(document, "neither chain", newer);
});

test("keys and signatures of small order, and second spellings, are refused", async () => {
  const weak = ["00".repeat(32), "01" + "00".repeat(31), "ec" + "ff".repeat(30) + "7f", "ed" + "ff".repeat(30) + "7f", "ff".repeat(32)];
  const { isWeak, verifies } = await import("../../sdk/javascript/src/trust/ed25519.js");
  for (const key of weak.map((hex) => Uint8Array.from(Buffer.from(hex, "hex")))) {
    ok(isWeak(key), Buffer.from(key).toString("hex"));
    same(await verifies(key, new Uint8Array(64), ascii("anything")), false);
  }
  ok(!isWeak(root.raw));
  const [head, payload, signature] = jws(claims(), signer, "lacre-manifest+jwt").split(".");
  const last = signature.at(-1);
  const other = String.fromCharCode(last.charCodeAt(0) + 1); // the same bytes, in another spelling
  const spelled = (end) => json({ roots: [signed(statement(signer), root)], manifest: `${head}.${payload}.${signature.slice(0, -1)}${end}` });
  same((await verified(spelled(last))).ver, 7);
  await refused(spelled(other), "another spelling");
  await refused(spelled(`${last}=`), "padding");
});

test("a receipt is the pool's and of this request", async () => {
  const digest = new Uint8Array(32).fill(5);
  const whole = { enc: toBase64url(digest), model: "", prompt_tokens: 1, cached_tokens: 0, completion_tokens: 34, start: 1, end: 2.5, final: true };
  const token = (changes, key = signer, typ = "lacre-receipt+jwt") => ["lacre-receipt", jws({ ...whole, ...changes }, key, typ)];
  const read = (...trailers) => receiptOf(trailers, { key: signer.raw, digest, ceiling: 34 });
  same((await read(["x", "y"], token())).completion_tokens, 34);
  for (const trailers of [
    [],
    [token(), token()],
    [token({}, stranger)],
    [token({}, signer, "other+jwt")],
    [token({ enc: "AA" })],
    [token({ final: false })],
    [token({ final: 1 })],
    [token({ completion_tokens: 35 })],
    [token({ completion_tokens: -1 })],
    [token({ prompt_tokens: "1" })],
    [token({ model: undefined })],
    [["lacre-receipt", "rubbish"]],
  ]) {
    await rejects(read(...trailers), { name: "InvalidReceiptError" }, JSON.stringify(trailers).slice(0, 60));
  }
  const [named, other] = ["1".repeat(64), "2".repeat(64)];
  const check = (model, listed, pin, ran = true) => checkModel({ model }, "m", digestsOf("m", listed, pin), ran);
  check(`sha256:${named}`, [named]);
  check("", [named], undefined, false);
  check("anything", []);
  check(`sha256:${named}`, [], `sha256:${named}`);
  for (const [model, listed, pin] of [[`sha256:${other}`, [named]], [named, [named]], ["", [named]], ["", [], `sha256:${named}`], [`sha256:${named}`, [named], `sha256:${other}`]]) {
    throws(() => check(model, listed, pin), { name: "WrongModelError" }, model);
  }
});

// Sealing

test("public keys that give nothing are refused", async () => {
  for (const [kemId, { publicKeySize, make }] of KEMS) {
    const { publicKey } = await make().generateKeyPair();
    const raw = new Uint8Array(await make().serializePublicKey(publicKey));
    const algorithms = Uint8Array.of(0, 4, 0, 1, 0, 2);
    const sealTo = (key) => SealedRequest.to(parseKeyConfiguration(concat([uint(1, 1), uint(kemId, 2), key, algorithms])));
    await sealTo(raw);
    await rejects(sealTo(raw.slice().fill(0, publicKeySize - 32)), NoUsableKeyError, "the X25519 output is zero");
    if (publicKeySize > 32) await rejects(sealTo(raw.slice().fill(255, 0, 3)), NoUsableKeyError, "a coefficient above q");
  }
});

test("every suite seals what opens again", async () => {
  for (const [kemId, { make }] of KEMS) {
    for (const aeadId of [1, 2, 3]) {
      const keys = await make().generateKeyPair();
      const raw = new Uint8Array(await make().serializePublicKey(keys.publicKey));
      const config = parseKeyConfiguration(concat([uint(1, 1), uint(kemId, 2), raw, Uint8Array.of(0, 4, 0, 1, 0, aeadId)]));
      const request = await SealedRequest.to(config);
      const sealed = await request.seal(ascii("asked"));
      const info = concat([ascii("message/bhttp chunked request"), Uint8Array.of(0), sealed.slice(0, 7)]);
      const context = await suiteOf(config).createRecipientContext({ recipientKey: keys.privateKey, enc: request.enc, info });
      same(Buffer.from(await context.open(sealed.slice(7 + request.enc.length + 1), ascii("final"))).toString(), "asked");
    }
  }
});

test("a request that would be too long is refused", async () => {
  const request = await SealedRequest.to(parseKeyConfiguration(await usable()));
  await rejects(request.seal(new Uint8Array(MAX_SEALED_REQUEST)), TooLargeError);
  await rejects(request.seal(new Uint8Array(1)), UsedError);
});

async function usable() {
  const kem = KEMS.get(0x0020).make();
  const raw = await kem.serializePublicKey((await kem.generateKeyPair()).publicKey);
  return concat([uint(1, 1), uint(0x0020, 2), new Uint8Array(raw), Uint8Array.of(0, 4, 0, 1, 0, 2)]);
}

// Binary HTTP

const field = (name, value) => concat([varint(name.length), ascii(name), varint(value.length), ascii(value)]);
const response = (...parts) => concat([Uint8Array.of(3), ...parts]);
const OK = varint(200);
const ZERO = Uint8Array.of(0);
const END = Uint8Array.of(0, 0);

function read(message) {
  const reader = new ResponseReader();
  return [...reader.push(message), ...reader.end()];
}

test("responses may end where RFC 9292 section 3.8 lets them, and nowhere else", () => {
  const whole = response(OK, field("a", "b"), ZERO, varint(2), ascii("hi"), ZERO, field("c", "d"), ZERO);
  same(read(whole).map(({ kind }) => kind), ["head", "content", "trailers"]);
  const behindStatus = 1 + OK.length; // as in the example of RFC 9458
  const behindHeaders = behindStatus + 4 + 1;
  const behindContent = behindHeaders + 3 + 1;
  for (let size = 0; size < whole.length; size++) {
    const cut = whole.subarray(0, size);
    if ([behindStatus, behindHeaders, behindContent].includes(size)) same(read(cut).at(-1), { kind: "trailers", fields: [] });
    else throws(() => read(cut), TruncatedError, `${size}`);
  }
  const known = concat([Uint8Array.of(1), OK, ZERO]);
  same(read(known).map(({ kind }) => kind), ["head", "trailers"]);
  same(read(known.subarray(0, -1)).map(({ kind }) => kind), ["head", "trailers"]);
  throws(() => read(known.subarray(0, -2)), TruncatedError);
});

test("responses that are not right are refused", () => {
  const long = (limit) => "v".repeat(limit);
  for (const [wrong, error] of [
    [concat([Uint8Array.of(0), OK, END]), MalformedError],
    [concat([Uint8Array.of(2), OK, END]), MalformedError],
    [response(varint(101), ZERO, OK, ZERO, END), MalformedError],
    [response(varint(99), ZERO, END), MalformedError],
    [response(varint(600), ZERO, END), MalformedError],
    [response(...Array(17).fill(concat([varint(103), ZERO])), OK, ZERO, END), TooLargeError],
    [response(OK, ZERO, END, Uint8Array.of(1)), MalformedError],
    ...["A", ":path", "a b", "é", "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "te"].map(
      (name) => [response(OK, field(name, "x"), ZERO, END), MalformedError],
    ),
    ...["a\nb", "a\rb", "a\0b", " a", "a ", "\ta", "a\t", "a\x7fb", "\x01"].map(
      (value) => [response(OK, field("x", value), ZERO, END), MalformedError],
    ),
    [response(OK, varint(LIMITS.name + 1)), TooLargeError],
    [response(OK, varint(1), ascii("a"), varint(LIMITS.value + 1)), TooLargeError],
    [response(OK, ...Array(129).fill(field("a", "b")), ZERO, END), TooLargeError],
    [response(OK, ...Array(5).fill(field("a", long(LIMITS.value))), ZERO, END), TooLargeError],
    [response(OK, ZERO, ZERO, ...Array(3).fill(field("a", long(LIMITS.value))), ZERO), TooLargeError],
    [response(OK, ZERO, varint(LIMITS.content + 1)), TooLargeError],
    [response(OK, field("content-length", "3"), ZERO, varint(2), ascii("hi"), ZERO, ZERO), MalformedError],
    [response(OK, field("content-length", "0"), field("content-length", "3"), ZERO, END), MalformedError],
    [response(OK, field("content-length", "+2"), ZERO, varint(2), ascii("hi"), ZERO, ZERO), MalformedError],
    [concat([Uint8Array.of(1), OK, varint(LIMITS.headers + 1)]), TooLargeError],
    [concat([Uint8Array.of(1), OK, varint(2), field("a", "b"), END]), MalformedError],
    [concat([Uint8Array.of(1), OK, ZERO, varint(LIMITS.content + 1)]), TooLargeError],
  ]) {
    throws(() => read(wrong), error, Buffer.from(wrong.subarray(0, 60)).toString("latin1"));
  }
  read(response(OK, field("te", "trailers"), field("x", "a\tb\xff"), field("y", ""), ZERO, END));
  read(response(OK, field("content-length", "5"), ZERO, END));
});

test("requests that receivers would refuse are not written", () => {
  const good = { method: "POST", scheme: "https", authority: "lacre.invalid", path: "/", fields: [], content: ascii("hi") };
  encodeRequest(good);
  for (const wrong of [
    { method: "CONNECT" },
    { method: "A B" },
    { method: "M".repeat(33) },
    { scheme: "ftp" },
    { authority: "user@host" },
    { path: "relative" },
    { path: "/a#b" },
    { path: "/" + "a".repeat(LIMITS.path) },
    { fields: [["Upper", "x"]] },
    { fields: [["x", "a\r\nb"]] },
    { fields: [["x", "\u0100"]] },
    { fields: [["content-length", "3"]] },
    { fields: Array(129).fill(["a", "b"]) },
  ]) {
    throws(() => encodeRequest({ ...good, ...wrong }), JSON.stringify(wrong));
  }
});
