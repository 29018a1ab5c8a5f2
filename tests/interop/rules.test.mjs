/** Rules of wire.md that no exchange with an honest gateway shows. `node --test` runs them. */

import { deepStrictEqual as same, rejects, throws } from "node:assert";
import { generateKeyPairSync, sign } from "node:crypto";
import { test } from "node:test";

import { encodeRequest, LIMITS, ResponseReader } from "./bhttp.mjs";
import { ascii, concat, toBase64url, uint, varint } from "./bytes.mjs";
import {
  ConfigurationError,
  MalformedError,
  NoUsableKeyError,
  TooLargeError,
  TruncatedError,
  TrustError,
} from "./errors.mjs";
import { KEMS, parseKeyConfiguration, suiteOf } from "./keys.mjs";
import { MAX_SEALED_REQUEST, SealedRequest } from "./ohttp.mjs";
import { ordered } from "./routes.mjs";
import { chooseKey, MAX_DOCUMENT, parseConnectionString, readReceipt, Trust, verifyDocument } from "./trust.mjs";

const NOW = 1_780_000_000;

// Signing, for these tests alone

function newKey() {
  const { privateKey, publicKey } = generateKeyPairSync("ed25519");
  return { privateKey, raw: Uint8Array.from(Buffer.from(publicKey.export({ format: "jwk" }).x, "base64url")) };
}

const json = (value) => ascii(JSON.stringify(value));

function jws(payload, key, typ, alg = "EdDSA") {
  const bytes = payload instanceof Uint8Array ? payload : json(payload);
  const signed = `${toBase64url(json({ alg, typ }))}.${toBase64url(bytes)}`;
  return `${signed}.${toBase64url(sign(null, ascii(signed), key.privateKey))}`;
}

const statement = (signer, exp = NOW + 100, next = null) =>
  json({ typ: "lacre-root", signer: toBase64url(signer.raw), exp, next_root: next && toBase64url(next.raw) });
const signed = (payload, ...keys) => keys.map((key) => jws(payload, key, "lacre-root+jwt"));

const configuration = (kemId, size, algorithms = "00010002") =>
  concat(uint(1, 1), uint(kemId, 2), new Uint8Array(size).fill(9), uint(algorithms.length / 2, 2), Buffer.from(algorithms, "hex"));
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
const verified = (document, pin = root) => verifyDocument(document, pin.raw, NOW);

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

test("a manifest verifies", () => {
  const manifest = verified(simple());
  const { models, defaultModel } = manifest.pools.get("default");
  same([manifest.ver, [...models.keys()], defaultModel], [7, ["m"], "m"]);
});

test("a chain of roots is followed from the pinned one", () => {
  const handover = statement(signer, NOW + 100, newer);
  const first = signed(statement(stranger), root);
  const change = signed(handover, root, newer);
  const after = signed(statement(signer), newer);
  const alien = [jws(statement(signer), root, "other+jwt"), jws(statement(signer), root, "lacre-root+jwt", "ES256")];
  for (const roots of [[first, change], [first, change, after], [signed(statement(signer, 1), root), first, change, after]]) {
    same(verified(documentOf(roots, claims())).ver, 7);
  }
  same(verified(documentOf([first, change, after], claims()), newer).ver, 7, "what was before the pin is passed over");
  same(verified(documentOf([alien, change], claims())).ver, 7, "of another alg or typ: by nobody");

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
    throws(() => verified(documentOf(roots, claims())), TrustError, why);
  }
});

test("a statement or manifest that is not right is refused", () => {
  const { next_root: _, ...incomplete } = JSON.parse(Buffer.from(statement(signer)));
  throws(() => verified(documentOf([signed(json(incomplete), root)], claims())), TrustError);
  throws(() => verified(documentOf([signed(statement(signer), root)], claims(), stranger)), TrustError);
  const sameKeyOtherTyp = json({ roots: [signed(statement(signer), root)], manifest: jws(claims(), signer, "lacre-root+jwt") });
  throws(() => verified(sameKeyOtherTyp), TrustError);
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
    throws(() => verified(simple(changes)), TrustError, JSON.stringify(changes));
  }
  throws(() => verified(new Uint8Array(MAX_DOCUMENT + 1)), TrustError);
  throws(() => verified(ascii("{")), TrustError);
});

test("routes of a manifest", () => {
  const way = { pool: "default", share: 95, later: 1 };
  const { routes } = verified(simple({ routes: { m: { pools: [way, { pool: "p", model: "n" }], later: 1 } } }));
  const both = [{ pool: "default", model: "m", share: 95 }, { pool: "p", model: "n", share: 0 }];
  same(routes.get("m"), both);
  same(verified(simple()).routes.size, 0, "a manifest without routes");
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
    throws(() => verified(simple({ routes: wrong })), TrustError, JSON.stringify(wrong).slice(0, 80));
  }
});

test("a draw falls on each pool by its share", () => {
  const ways = [["a", 2], ["b", 0], ["c", 1]].map(([pool, share]) => ({ pool, model: "m", share }));
  const firsts = [0, 1, 2].map((drawn) => ordered(ways, () => drawn).map(({ pool }) => pool).join(""));
  same(firsts, ["abc", "abc", "cab"]);
  same(ordered(ways.map((way) => ({ ...way, share: 0 })))[0].pool, "a", "without shares, the first has all");
});

test("the newest manifest is remembered", () => {
  const old = simple({ ver: 7 });
  const trust = new Trust(new URL("http://127.0.0.1"), root.raw);
  same(trust.accept(old, NOW).ver, 7);
  same(trust.accept(old, NOW).ver, 7);
  throws(() => trust.accept(simple({ ver: 7, iat: NOW - 1 }), NOW), TrustError);
  same(trust.accept(simple({ ver: 9, exp: NOW + 10 }), NOW).ver, 9);
  same(trust.accept(old, NOW).ver, 9, "the remembered one is used while it verifies");
  throws(() => trust.accept(old, NOW + 20), TrustError);
});

test("the choice of a key", () => {
  const key = (config, notAfter = NOW + 50) => ({ config: toBase64url(config), not_after: notAfter });
  const unknownKem = concat(uint(1, 1), uint(0x1234, 2), ascii("whatever"));
  const unknownAead = configuration(0x647a, 1216, "0001ffff" + "00020002");
  const chacha = configuration(0x647a, 1216, "0001ffff" + "00010001" + "00010003");
  const chosen = (keys, kems) => chooseKey(verified(simple({}, keys)).pools.get("default"), kems, NOW);

  same(chosen([key(unknownKem), key(unknownAead), key(X25519), key(XWING, NOW), key(chacha), key(XWING)]).aeadId, 3);
  same(chosen([key(X25519), key(XWING)], ["xwing", "x25519"]).kem.name, "xwing");
  same(chosen([key(XWING), key(X25519)], ["x25519"]).kem.name, "x25519");
  for (const keys of [[], [key(X25519)], [key(XWING, NOW)], [key(unknownKem), key(unknownAead)]]) {
    throws(() => chosen(keys), NoUsableKeyError);
  }
  const noAlgorithms = configuration(0x647a, 1216, "");
  for (const config of [new Uint8Array(), XWING.subarray(0, -1), concat(XWING, Uint8Array.of(0)), noAlgorithms]) {
    throws(() => chosen([key(XWING), key(config)]), TrustError);
  }
});

test("a receipt is the pool's and of this request", () => {
  const pool = verified(simple()).pools.get("default");
  const digest = new Uint8Array(32).fill(5);
  const receipt = (changes) => ({ enc: toBase64url(digest), completion_tokens: 34, ...changes });
  same(readReceipt(jws(receipt(), signer, "lacre-receipt+jwt"), pool, digest)?.completion_tokens, 34);
  same(readReceipt(jws(receipt(), stranger, "lacre-receipt+jwt"), pool, digest), null);
  same(readReceipt(jws(receipt(), signer, "other+jwt"), pool, digest), null);
  same(readReceipt(jws(receipt({ enc: "AA" }), signer, "lacre-receipt+jwt"), pool, digest), null);
  same(readReceipt("rubbish", pool, digest), null);

  const [named, other] = ["1".repeat(64), "2".repeat(64)];
  const naming = { ...pool, models: new Map([["m", { sha256: [named], signers: [] }]]) };
  const by = (model, name = "m") => readReceipt(jws(receipt({ model }), signer, "lacre-receipt+jwt"), naming, digest, name);
  same(by(`sha256:${named}`)?.completion_tokens, 34);
  for (const wrong of [`sha256:${other}`, named, "", undefined]) same(by(wrong), null);
  same(by("", "unnamed")?.completion_tokens, 34, "a model without a digest may be any file");
});

// Sealing

test("public keys that give nothing are refused", async () => {
  for (const [kemId, { publicKeySize, make }] of KEMS) {
    const { publicKey } = await make().generateKeyPair();
    const raw = new Uint8Array(await make().serializePublicKey(publicKey));
    const algorithms = Uint8Array.of(0, 4, 0, 1, 0, 2);
    const sealTo = (key) => SealedRequest.to(parseKeyConfiguration(concat(uint(1, 1), uint(kemId, 2), key, algorithms)));
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
      const config = parseKeyConfiguration(concat(uint(1, 1), uint(kemId, 2), raw, Uint8Array.of(0, 4, 0, 1, 0, aeadId)));
      const request = await SealedRequest.to(config);
      const parts = [];
      for await (const part of request.seal([ascii("asked")])) parts.push(part);
      const info = concat(ascii("message/bhttp chunked request"), Uint8Array.of(0), parts[0].slice(0, 7));
      const context = await suiteOf(config).createRecipientContext({ recipientKey: keys.privateKey, enc: request.enc, info });
      same(Buffer.from(await context.open(parts[1].slice(1), ascii("final"))).toString(), "asked");
    }
  }
});

test("a request that would be too long is refused", async () => {
  const request = await SealedRequest.to(parseKeyConfiguration(await usable()));
  await rejects(async () => {
    for await (const _ of request.seal([new Uint8Array(MAX_SEALED_REQUEST)]));
  }, TooLargeError);
  await rejects(request.opener());
});

async function usable() {
  const kem = KEMS.get(0x0020).make();
  const raw = await kem.serializePublicKey((await kem.generateKeyPair()).publicKey);
  return concat(uint(1, 1), uint(0x0020, 2), new Uint8Array(raw), Uint8Array.of(0, 4, 0, 1, 0, 2));
}

// Binary HTTP

const field = (name, value) => concat(varint(name.length), ascii(name), varint(value.length), ascii(value));
const response = (...parts) => concat(Uint8Array.of(3), ...parts);
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
  const behindHeaders = 1 + OK.length + 4 + 1;
  const behindContent = behindHeaders + 3 + 1;
  for (let size = 0; size < whole.length; size++) {
    const cut = whole.subarray(0, size);
    if (size === behindHeaders || size === behindContent) same(read(cut).at(-1), { kind: "trailers", fields: [] });
    else throws(() => read(cut), TruncatedError, `${size}`);
  }
  const known = concat(Uint8Array.of(1), OK, ZERO);
  same(read(known).map(({ kind }) => kind), ["head", "trailers"]);
  throws(() => read(known.subarray(0, -1)), TruncatedError);
});

test("responses that are not right are refused", () => {
  const long = (limit) => "v".repeat(limit);
  for (const [wrong, error] of [
    [concat(Uint8Array.of(0), OK, END), MalformedError],
    [concat(Uint8Array.of(2), OK, END), MalformedError],
    [response(varint(101), ZERO, OK, ZERO, END), MalformedError],
    [response(varint(99), ZERO, END), MalformedError],
    [response(varint(600), ZERO, END), MalformedError],
    [response(...Array(17).fill(concat(varint(103), ZERO)), OK, ZERO, END), TooLargeError],
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
    [concat(Uint8Array.of(1), OK, varint(LIMITS.headers + 1)), TooLargeError],
    [concat(Uint8Array.of(1), OK, varint(2), field("a", "b"), END), MalformedError],
    [concat(Uint8Array.of(1), OK, ZERO, varint(LIMITS.content + 1)), TooLargeError],
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
