/** `node vectors.mjs [NAME]`: against docs/vectors/NAME.json, and all else that docs/wire.md section 16 asks of a client. */

import { deepStrictEqual as same, ok, rejects, throws } from "node:assert";
import { createHash, createPrivateKey, createPublicKey } from "node:crypto";
import { readFileSync } from "node:fs";

import { AlteredError, MessageError, TruncatedError, UsedError } from "../../sdk/javascript/src/errors.js";
import { encodeRequest, ResponseReader } from "../../sdk/javascript/src/wire/bhttp.js";
import { ascii, concat, latin1 } from "../../sdk/javascript/src/wire/bytes.js";
import { headerOf, parseKeyConfiguration, suiteOf, TAG_SIZE } from "../../sdk/javascript/src/wire/keys.js";
import { MAX_CHUNK, requestInfo, ResponseOpener, responseKeys, responseSecretSize, SealedRequest } from "../../sdk/javascript/src/wire/ohttp.js";
import { SliceReader } from "../../sdk/javascript/src/wire/readers.js";
import { varint } from "../../sdk/javascript/src/wire/varint.js";

const bytes = (hex) => Uint8Array.from(Buffer.from(hex, "hex"));
const hex = (data) => Buffer.from(data).toString("hex");

const NAME = process.argv[2] ?? "xwing-aes-256-gcm";
const V = JSON.parse(readFileSync(new URL(`../../docs/vectors/${NAME}.json`, import.meta.url), "utf8"));
const config = parseKeyConfiguration(bytes(V.key_configuration));
const header = bytes(V.header);
const [hdr, enc] = [header.slice(0, 7), header.slice(7)];
const nonce = bytes(V.response_nonce);
const chunks = V.response_chunks.map(bytes);
const response = concat([nonce, ...chunks]);
const opened = [...V.response_records, ""]; // the last chunk is the empty final one
const FINAL = ascii("final");
const PKCS8_X25519 = bytes("302e020100300506032b656e04220420"); // RFC 8410: what stands before the 32 bytes of a raw key
const EXPORT_LABEL = ascii("message/bhttp chunked response");

const checks = {
  "the key configuration": () => {
    same([config.keyId, `${config.kem.name}-${config.aead.name}`], [1, NAME]);
    same(hex(headerOf(config)), hex(hdr));
    same(enc.length, config.kem.encSize);
  },

  "the public key, from the secret key": async () => {
    if (config.kem.name === "x25519") {
      const key = Buffer.concat([PKCS8_X25519, bytes(V.secret_key)]);
      const { x } = createPublicKey(createPrivateKey({ key, format: "der", type: "pkcs8" })).export({ format: "jwk" });
      return same(Buffer.from(x, "base64url").toString("hex"), hex(config.publicKey));
    }
    const { kem } = suiteOf(config);
    const { publicKey } = await kem.generateKeyPairDerand(bytes(V.secret_key));
    same(hex(await kem.serializePublicKey(publicKey)), hex(config.publicKey));
  },

  "info, and the name of the request": () => {
    same(hex(requestInfo(hdr)), V.info);
    same(createHash("sha256").update(header).digest("hex"), V.header_sha256);
  },

  "the shared secret": async () => {
    const { kem } = suiteOf(config);
    const recipientKey = await kem.deserializePrivateKey(bytes(V.secret_key));
    same(hex(await kem.decap({ recipientKey, enc })), V.shared_secret);
  },

  "the request's chunks open to its Binary HTTP; the exported secret": async () => {
    const { plain, context } = await openRequest(header, V.request_chunks.map(bytes));
    same(hex(plain), V.request_binary_http);
    same(hex(await context.export(EXPORT_LABEL, responseSecretSize(config.aead))), V.exported_secret);
  },

  "the Binary HTTP of the request": () => {
    const whole = bytes(V.request_binary_http);
    const encoded = encodeRequest(readRequest(whole));
    same(hex(whole.subarray(0, encoded.length)), hex(encoded));
    ok(whole.subarray(encoded.length).every((byte) => byte === 0), "what follows is padding");
  },

  "the response's keys": async () => {
    const { prk, key, base } = await responseKeys(config.aead, enc, bytes(V.exported_secret), nonce);
    same([hex(prk), hex(key), hex(base)], [V.prk, V.response_key, V.response_base_nonce]);
  },

  "the response's records, at once and byte by byte": async () => {
    same(await openAll(response), opened);
    same(await openAll(...[...response].map((byte) => Uint8Array.of(byte))), opened);
  },

  "each record opens as soon as it is there": async () => {
    const opener = newOpener();
    same(await all(opener.push(nonce)), []);
    for (const [i, chunk] of chunks.slice(0, -1).entries()) same((await all(opener.push(chunk))).map(hex), [opened[i]]);
    same(await all(opener.push(chunks.at(-1))), [], "the final chunk waits for the end of the body");
    same((await all(opener.end())).map(hex), [""]);
    throws(() => opener.end(), UsedError);
  },

  "the Binary HTTP of the response": () => {
    const [head, content, done, trailers, ...rest] = readResponse(bytes(V.response_records.join("")));
    same([head.status, head.fields], [200, [["content-type", "text/event-stream"]]]);
    same(latin1(content.bytes), 'data: {"choices":[{"index":0,"delta":{"content":"The Baltic"}}]}\n\n');
    same(latin1(done.bytes), "data: [DONE]\n\n");
    same([trailers.fields, rest], [[["lacre-receipt", "e30.e30.AA"]], []]);
  },

  "what is sealed here opens with the vector's key": async () => {
    const content = Uint8Array.from({ length: 2 * MAX_CHUNK + 1 }, (_, i) => i);
    const request = await SealedRequest.to(config);
    await rejects(request.opener(), UsedError); // not before the whole request is sealed
    const [head, ...sealed] = parted(await request.seal(content));
    same(sealed.length, 3, "two full chunks and the final one");
    same(hex((await openRequest(head, sealed)).plain), hex(content));
    same(hex(await request.digest()), createHash("sha256").update(head).digest("hex"));
    await rejects(request.seal(content), UsedError);
    await request.opener();
    await rejects(request.opener(), UsedError);
  },

  "any one bit flipped is an error": async () => {
    for (let i = 0; i < response.length * 8; i++) {
      const altered = Uint8Array.from(response);
      altered[i >> 3] ^= 1 << (i & 7);
      await rejects(openAll(altered), MessageError, `bit ${i}`);
    }
  },

  "a response cut anywhere is an error, and the last chunk left out a truncation": async () => {
    for (let size = 0; size < response.length; size++) await rejects(openAll(response.subarray(0, size)), MessageError);
    await rejects(openAll(nonce, ...chunks.slice(0, -1)), TruncatedError);
  },

  "two chunks swapped are an error": async () => {
    const [first, second, ...rest] = chunks;
    await rejects(openAll(nonce, second, first, ...rest), AlteredError);
  },

  "a byte added at the end is an error": async () => {
    await rejects(openAll(response, Uint8Array.of(0)), AlteredError);
  },

  "the response of another request is an error, and nothing more is opened": async () => {
    const request = await SealedRequest.to(config);
    await request.seal(ascii("another"));
    const opener = await request.opener();
    await rejects(all(opener.push(response)), AlteredError);
    throws(() => opener.push(response), UsedError);
  },

  "longer forms of a length are read": async () => {
    const length = new SliceReader(chunks[0]).varint();
    const long = concat([Uint8Array.of(0x80, 0, 0, length), chunks[0].subarray(varint(length).length)]);
    same(await openAll(nonce, long, ...chunks.slice(1)), opened);
  },

  "a length is judged before what it announces is there": async () => {
    for (const length of [1, TAG_SIZE, MAX_CHUNK + TAG_SIZE + 1, 2 ** 40]) {
      await rejects(all(newOpener().push(concat([nonce, varint(length)]))), MessageError, `${length}`);
    }
    const final = concat([nonce, Uint8Array.of(0), new Uint8Array(MAX_CHUNK + TAG_SIZE + 1)]);
    await rejects(all(newOpener().push(final)), MessageError);
  },

  "RFC 9000 appendix A.1: varints": () => {
    const examples = [["c2197c5eff14e88c", Number(151288809941952652n)], ["9d7f3e7d", 494878333], ["7bbd", 15293], ["25", 37]];
    for (const [form, value] of [...examples, ["4025", 37]]) same(new SliceReader(bytes(form)).varint(), value, form);
    for (const [form, value] of examples.slice(1)) same(hex(varint(value)), form);
  },

  "RFC 9292 section 5.1: a request": () => {
    const fields = [
      ["user-agent", "curl/7.16.3 libcurl/7.16.3 OpenSSL/0.9.7l zlib/1.2.3"],
      ["host", "www.example.com"],
      ["accept-language", "en, mi"],
    ];
    const request = { method: "GET", scheme: "https", authority: "", path: "/hello.txt", fields, content: new Uint8Array() };
    const start = "0003474554056874747073000a2f68656c6c6f2e747874406c0a757365722d6167656e7434";
    const encoded = encodeRequest(request);
    same(hex(encoded).slice(0, start.length), start);
    same(hex(encoded.subarray(-2)), "0000"); // no content, no trailers
    same(readRequest(encoded), request);
  },

  "RFC 9292 section 5.2: responses": () => {
    const content = "Hello World! My content includes a trailing CRLF.\r\n";
    const early = concat([
      bytes("03406607" + "72756e6e696e67" + "0a" + "22736c65657020313522" + "00"),
      bytes("4067"),
      field("link", "</style.css>; rel=preload; as=style"),
      field("link", "</script.js>; rel=preload; as=script"),
      bytes("0040c8"),
      field("content-length", String(content.length)),
      bytes("0033"),
      ascii(content),
    ]);
    for (const end of ["0000", "00", "0000" + "000000"]) {
      const told = readResponse(concat([early, bytes(end)])); // trailers may be left out; zeros may follow
      same(told.map(({ kind, status }) => status ?? kind), [102, 103, 200, "content", "trailers"]);
      same(told[1].fields.length, 2);
    }
    throws(() => readResponse(early), TruncatedError);
    throws(() => readResponse(concat([early, bytes("000001")])), MessageError); // padding that is not zero

    const known = readResponse(
      concat([bytes("0140c8001d"), ascii("This content contains CRLF.\r\n"), bytes("0d"), field("trailer", "text")]),
    );
    same(known.map(({ kind }) => kind), ["head", "content", "trailers"]);
    same(known[2].fields, [["trailer", "text"]]);
  },
};

const newOpener = () => new ResponseOpener(config.aead, enc, bytes(V.exported_secret));

async function openAll(...parts) {
  const opener = newOpener();
  const found = [];
  for (const part of parts) found.push(...(await all(opener.push(part))));
  return [...found, ...(await all(opener.end()))].map(hex);
}

/** A sealed request as its head and its chunks, each with its length. */
function parted(sealed) {
  const reader = new SliceReader(sealed);
  const parts = [reader.take(header.length)];
  for (let length = 1; length > 0; ) {
    const left = reader.left;
    length = reader.varint();
    const prefix = left - reader.left;
    const chunk = reader.take(length || reader.left);
    parts.push(sealed.subarray(chunk.byteOffset - prefix, chunk.byteOffset + chunk.length));
  }
  return parts;
}

function readResponse(message) {
  const reader = new ResponseReader();
  return [...reader.push(message), ...reader.end()];
}

/** What a worker does with a request: here for the checks alone. Every chunk comes with its length. */
async function openRequest(head, sealed) {
  const suite = suiteOf(config);
  const recipientKey = await suite.kem.deserializePrivateKey(bytes(V.secret_key));
  const context = await suite.createRecipientContext({ recipientKey, enc: head.slice(7), info: requestInfo(head.slice(0, 7)) });
  const plain = [];
  for (const [i, chunk] of sealed.entries()) {
    const reader = new SliceReader(chunk);
    const length = reader.varint();
    const last = i === sealed.length - 1;
    same(length, last ? 0 : reader.left);
    plain.push(new Uint8Array(await context.open(reader.take(reader.left), last ? FINAL : new Uint8Array())));
  }
  return { plain: concat(plain), context };
}

/** A known-length request (RFC 9292 section 3.1), taken apart. */
function readRequest(message) {
  const reader = new SliceReader(message);
  same(reader.varint(), 0);
  const text = (from) => latin1(from.take(from.varint()));
  const [method, scheme, authority, path] = [text(reader), text(reader), text(reader), text(reader)];
  const section = new SliceReader(reader.take(reader.varint()));
  const fields = [];
  while (section.left > 0) fields.push([text(section), text(section)]);
  const content = reader.take(reader.varint());
  same(reader.varint(), 0, "no trailers");
  return { method, scheme, authority, path, fields, content };
}

const field = (name, value) => concat([varint(name.length), ascii(name), varint(value.length), ascii(value)]);

async function all(pieces) {
  const found = [];
  for await (const piece of pieces) found.push(piece);
  return found;
}

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok    ${name}`);
  } catch (error) {
    console.log(`WRONG ${name}\n${error.stack}`);
    process.exitCode = 1;
  }
}
