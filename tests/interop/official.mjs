/**
 * `node official.mjs FILE...`: the base-mode HPKE vectors in FILE (those of `cryptography-vectors`) for the suites that Lacre has,
 * the chunked draft's example, and RFC 9458's. Exits 1 where one does not hold.
 */

import { deepStrictEqual as same, ok } from "node:assert";
import { readFileSync } from "node:fs";

import { ascii, concat, uint } from "../../sdk/javascript/src/wire/bytes.js";
import { AEADS, KDF_HKDF_SHA256, KEMS, suiteOf } from "../../sdk/javascript/src/wire/keys.js";
import { requestInfo, ResponseOpener, responseKeys } from "../../sdk/javascript/src/wire/ohttp.js";

const bytes = (hex) => Uint8Array.from(Buffer.from(hex, "hex"));
const hex = (data) => Buffer.from(data).toString("hex");
const BASE = 0;
const EXPORT_ONLY = 0xffff; // an AEAD that Lacre has no use for

async function recipient(suite, secretKey, enc, info) {
  const recipientKey = await suite.kem.deserializePrivateKey(secretKey);
  return suite.createRecipientContext({ recipientKey, enc, info });
}

async function checkHpke(vector) {
  const suite = suiteOf({ kem: KEMS.get(vector.kem_id), aead: AEADS.get(vector.aead_id) });
  const context = await recipient(suite, bytes(vector.skRm), bytes(vector.enc), bytes(vector.info));
  for (const { aad, ct, pt } of vector.encryptions) same(hex(await context.open(bytes(ct), bytes(aad))), pt);
  for (const { exporter_context, L, exported_value } of vector.exports) {
    same(hex(await context.export(bytes(exporter_context), L)), exported_value);
  }
}

async function checkFiles(files) {
  let count = 0;
  for (const file of files) {
    for (const vector of JSON.parse(readFileSync(file, "utf8"))) {
      const { mode, kem_id: kem, kdf_id: kdf, aead_id: aead } = vector;
      if (mode !== BASE || !KEMS.has(kem) || kdf !== KDF_HKDF_SHA256 || aead === EXPORT_ONLY) continue;
      await checkHpke(vector);
      count += 1;
    }
  }
  ok(count > 0, "the files hold no vector of our suites");
  console.log(`ok    HPKE: ${count} vectors`);
}

/** The example at the end of the chunked draft, AES-128-GCM. */
async function checkChunkedDraft() {
  const secretKey = bytes("1c190d72acdbe4dbc69e680503bb781a932c70a12c8f3754434c67d8640d8698");
  const hdr = bytes("01002000010001");
  const enc = bytes("8811eb457e100811c40a0aa71340a1b81d804bb986f736f2f566a7199761a032");
  const chunks = ["2ad24942d4d692563012f2980c8fef437a336b9b2fc938ef77a5834f", "2e33d8fd25577afe31bd1c79d094f76b6250ae6549b473ecd950501311"];
  const final = "1c6c1395d0ef7c1022297966307b8a7f";
  const aead = AEADS.get(0x0001);
  const suite = suiteOf({ kem: KEMS.get(0x0020), aead });
  const context = await recipient(suite, secretKey, enc, requestInfo(hdr));
  const opened = [];
  for (const chunk of chunks) opened.push(new Uint8Array(await context.open(bytes(chunk))));
  opened.push(new Uint8Array(await context.open(bytes(final), ascii("final"))));
  same(hex(concat(opened)), "00034745540568747470730b6578616d706c652e636f6d012f");
  const secret = new Uint8Array(await context.export(ascii("message/bhttp chunked response"), 16));
  same(hex(secret), "1d4484834ae36102a6ac42a5523454d9");
  const nonce = bytes("bcce7f4cb921309ba5d62edf1769ef09");
  const { prk, key, base } = await responseKeys(aead, enc, secret, nonce);
  same(
    [hex(prk), hex(key), hex(base)],
    ["3967884b5f7b4bce4a5320a3e3f79fdc97389f7deba1c1e11c5ea62278187786", "8209f78f2a1610d80c7125009b00aff0", "fead854635d2d5527d64f546"],
  );
  const opener = new ResponseOpener(aead, enc, secret);
  const body = "bcce7f4cb921309ba5d62edf1769ef091179bf1cc87fa0e2c02de4546945aa3d1e4812b348b5bd4c594c16b6170b07b475845d1f3200ed9d8a796617a5b27265f4d73247f639";
  const records = [];
  for await (const record of opener.push(bytes(body))) records.push(record);
  for await (const record of opener.end()) records.push(record);
  same(hex(concat(records)), "0140c8");
  console.log("ok    the chunked draft's example");
}

/** RFC 9458 appendix A: the same schedules under labels of their own. */
async function checkRfc9458() {
  const sealed = bytes(
    "010020000100014b28f881333e7c164ffc499ad9796f877f4e1051ee6d31bad19dec96c208b4726374e469135906992e1268c594d2a10c695d858c40a026e7965e7d86b83dd440b2c0185204b4d63525",
  );
  const [hdr, enc] = [sealed.slice(0, 7), sealed.slice(7, 39)];
  const suite = suiteOf({ kem: KEMS.get(0x0020), aead: AEADS.get(0x0001) });
  const info = concat([ascii("message/bhttp request"), uint(0, 1), hdr]);
  const context = await recipient(suite, bytes("3c168975674b2fa8e465970b79c8dcf09f1c741626480bd4c6162fc5b6a98e1a"), enc, info);
  same(hex(await context.open(sealed.slice(39))), "00034745540568747470730b6578616d706c652e636f6d012f");
  same(hex(await context.export(ascii("message/bhttp response"), 16)), "62d87a6ba569ee81014c2641f52bea36");
  console.log("ok    RFC 9458 appendix A");
}

await checkFiles(process.argv.slice(2));
await checkChunkedDraft();
await checkRfc9458();
