/**
 * The cases of tests/refusals/data by the npm package. Needs nothing but what browsers have.
 *
 * `from`: imports a module of the package, by its path in `src`. Each file's check says the same of a case as the Python SDK:
 * `{ is: … }`, or `{ javascript: "ExpiredError" }`.
 */

/** @param {any} value as tests/refusals/form.py packs bytes */
export function unpacked(value) {
  if (Array.isArray(value)) return joined(value.map(unpacked));
  if (typeof value === "string") return new TextEncoder().encode(value);
  if ("hex" in value) return Uint8Array.from(value.hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
  const one = unpacked(value.of);
  const all = new Uint8Array(one.length * value.times);
  for (let at = 0; at < all.length; at += one.length) all.set(one, at);
  return all;
}

function joined(parts) {
  const all = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  parts.reduce((at, part) => (all.set(part, at), at + part.length), 0);
  return all;
}

const text = (value) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(unpacked(value));
const edited = (before, { at, cut, put }) => [...before].toSpliced(at, cut, ...put).join("");

async function checks(from) {
  const { LacreError } = await from("errors.js");
  const { parseConnectionString } = await from("trust/connection.js");
  const { accept, ProcessMemory } = await from("trust/memory.js");
  const { proofOf } = await from("evidence/audit_proof.js");
  const { checkModel, receiptOf } = await from("evidence/receipts.js");
  const { fromBase64url, toBase64url, utf8 } = await from("wire/bytes.js");
  const { ResponseReader } = await from("wire/bhttp.js");
  const { AEADS, parseKeyConfiguration } = await from("wire/keys.js");
  const { ResponseOpener, SealedRequest } = await from("wire/ohttp.js");
  const { BASE_URL, refusalOf, sealedFetch } = await from("index.js");

  async function said(judge) {
    try {
      return { is: await judge() };
    } catch (error) {
      if (!(error instanceof LacreError)) throw error;
      return { javascript: error.name };
    }
  }

  const accepted = async (step, memory) =>
    (await accept(unpacked(step.document), fromBase64url(step.root), memory, step.now)).trusted.manifest.ver;

  function told(parts) {
    const found = [];
    let content = "";
    for (const part of parts) {
      if (part.kind === "content") content += String.fromCharCode(...part.bytes);
      else if (part.kind === "trailers") found.push(content, part.fields.length);
      else found.push(part.status, part.fields.length);
    }
    return found;
  }

  function decoded(pieces) {
    const reader = new ResponseReader();
    const parts = [];
    for (const piece of pieces) parts.push(...reader.push(piece));
    return told([...parts, ...reader.end()]);
  }

  const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

  return {
    addresses: (_, { text: given }) => said(() => toBase64url(parseConnectionString(given).root)),

    answers: ({ enc, aead, secret }, { pieces }) =>
      said(async () => {
        const opener = new ResponseOpener(AEADS.get(aead), unpacked({ hex: enc }), unpacked({ hex: secret }));
        const reader = new ResponseReader();
        const parts = [];
        for (const piece of pieces) for await (const record of opener.push(unpacked(piece))) parts.push(...reader.push(record));
        for await (const record of opener.end()) parts.push(...reader.push(record));
        return told([...parts, ...reader.end()]);
      }),

    configurations: (_, { config }) =>
      said(async () => {
        const found = parseKeyConfiguration(unpacked(config));
        if (found !== null) await SealedRequest.to(found);
        return found === null ? null : found.aeadId;
      }),

    async documents(_, { steps }) {
      const memory = new ProcessMemory();
      const [...before] = steps;
      const last = before.pop();
      for (const step of before) await accepted(step, memory);
      return said(() => accepted(last, memory));
    },

    async messages(_, { message }) {
      const bytes = unpacked(message);
      const whole = await said(() => decoded([bytes]));
      const pieces = await said(() => decoded(Array.from(bytes, (byte) => Uint8Array.of(byte))));
      return same(whole, pieces) ? whole : { whole, pieces };
    },

    outside({ root, manifest }, { to, status, headers, body }) {
      const bent = () => new Response([204, 304].includes(status) ? null : unpacked(body), { status, headers });
      const outer = async (url) => ((url.pathname === "/v1/manifest") === (to === "manifest") ? bent() : new Response(unpacked(manifest)));
      return said(async () => {
        const options = { token: "t", memory: new ProcessMemory(), retries: 0, resume: 0, kems: ["x25519"], fetch: outer };
        const fetch = await sealedFetch(`lacre+http://127.0.0.1:9?trust=${root}`, options);
        const asked = JSON.stringify({ messages: [{ role: "user", content: "hello" }] });
        const response = await fetch(`${BASE_URL}/chat/completions`, { method: "POST", body: asked });
        const refusal = refusalOf(response);
        if (refusal) throw refusal;
        return response.text();
      });
    },

    proofs: ({ keys, expected }, { header }) => said(async () => (await proofOf(text(header), keys.map(fromBase64url), expected)).index),

    statements({ root, receipt_key, now, digest, ceiling, statements }, { of, edit, signature }) {
      const usual = (name) => `${statements[name].header}.${toBase64url(utf8(statements[name].payload))}.${statements[name].signature}`;
      const payload = toBase64url(utf8(edited(statements[of].payload, edit)));
      const token = `${statements[of].header}.${payload}.${signature}`;
      if (of === "receipt") {
        const key = fromBase64url(receipt_key);
        const { model } = JSON.parse(statements.receipt.payload);
        return said(async () => {
          const receipt = await receiptOf([["lacre-receipt", token]], { key, digest: unpacked({ hex: digest }), ceiling });
          checkModel(receipt, "tiny", [model], true);
          return receipt.completion_tokens;
        });
      }
      const [manifest, statement] = ["manifest", "root statement"].map((name) => (name === of ? token : usual(name)));
      const document = JSON.stringify({ roots: [[statement]], manifest });
      return said(() => accepted({ document, root, now }, new ProcessMemory()));
    },
  };
}

/**
 * The cases of which the package says something else than the Python SDK.
 * @param {(path: string) => Promise<any>} from @param {string} name of the file @param {any} content of it
 */
export async function run(from, name, content) {
  const check = (await checks(from))[name];
  const wrong = [];
  for (const each of content.cases) {
    const found = await check(content, each);
    const asked = "is" in each.said ? each.said : { javascript: each.said.javascript };
    if (JSON.stringify(found) !== JSON.stringify(asked)) wrong.push({ case: each.name, of: each.of ?? each.to, asked: each.said, found });
  }
  return { cases: content.cases.length, wrong };
}
