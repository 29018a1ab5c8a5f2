/**
 * What the calls of one client share, and one sealed exchange (docs/wire.md sections 1, 10 to 14).
 *
 * - A request leaves only after a trusted manifest named the key that it is sealed to. There is no plaintext fallback.
 * - Every attempt is a fresh seal. Nobody signs a refusal, so it can cause one new manifest, one new seal and bounded retries.
 * - Nothing of an answer is opened before the gateway's proof that it recorded the request holds.
 * - The worker's date corrects the inner date alone, and never the check of an expiry.
 */

import { ConfigurationError, InvalidAuditError, LacreError, NetworkError, NoUsableKeyError, ProblemError, ProtocolError } from "../errors.js";
import { TruncatedError } from "../errors.js";
import { proofOf, speaksFor } from "../evidence/audit_proof.js";
import { checkModel, digestsOf, receiptOf } from "../evidence/receipts.js";
import { clock, MAX_DOCUMENT } from "../trust/chain.js";
import { chooseKey } from "../trust/manifest.js";
import { accept } from "../trust/memory.js";
import { encodeRequest, valueOf } from "../wire/bhttp.js";
import { randomBytes, toBase64url, toHex, utf8 } from "../wire/bytes.js";
import { hmac, MEDIA_TYPE_REQUEST, MEDIA_TYPE_RESPONSE, SealedRequest } from "../wire/ohttp.js";
import { shaped } from "../wire/shapes.js";
import { affinityOf } from "./affinity.js";
import { exchanged, SealedAnswer } from "./answer.js";
import { isRepeatable, prepare, userOf } from "./inner.js";
import { DATE, INVALID_TOKEN, mediaType, NO_WORKER, OHTTP_KEY, problemOf, readUpTo, UNKNOWN_POOL } from "./problems.js";
import { Retries, waited, within } from "./retries.js";
import { askedIn, pinOf, waysOf } from "./routing.js";

export const AUTHORITY = "lacre.invalid";
const SALT_LIFETIME = 3600; // seconds: the salt is a pseudonym as long as it lives
const MAX_CORRECTION = 30 * 86400; // seconds
const FETCH_LIMIT = 20; // seconds for the manifest's head and body: it has 1 MiB at most
const REFRESH_PAUSE = 30; // seconds between refreshes that an unsigned word or a failure suggests
const DATE_FORM = /^[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT$/;

/** @typedef {import("./inner.js").Plain} Plain */
/** @typedef {import("../trust/chain.js").Trusted} Trusted */
/**
 * @typedef {object} Options of one client or of some calls
 * @property {string | undefined} pool the caller's choice; else by the manifest's routes
 * @property {string | undefined} model of requests that name none
 * @property {string | undefined} cacheScope names one of the program's users, for a prefix cache apart
 * @property {number | null} retries null: as docs/retries.md says
 * @property {number} resume how often a broken answer is resumed
 * @property {readonly string[]} kems names of those accepted
 * @property {string} shape
 * @property {Map<string, string>} pinModels `sha256:…` by the model's name
 * @property {boolean} affinity whether a chat's requests say which conversation they are of
 * @property {boolean} keepIdentifyingFields
 */
/**
 * @typedef {object} Info what is known of one answer. Each part is one sealed request of it
 * @property {number} attempts
 * @property {number} lost workers that the call may have cost
 * @property {Part[]} parts
 */
/**
 * @typedef {object} Part
 * @property {string} pool @property {string} model @property {string} action @property {string} kem @property {string} shape
 * @property {number} sealedBytes @property {number} manifestVersion @property {string | null} requestId
 * @property {import("../evidence/audit_proof.js").AuditProof | null} audit
 * @property {import("../evidence/receipts.js").Receipt | null} receipt null until the whole answer was read
 */
/** @typedef {{ pool: string, model?: string, asked: string | null }} Way model: in place of the name that the caller asked for */
/** @typedef {{ options: Options, signal: AbortSignal | undefined, lost?: number, endurance?: number, stays?: { pool: string, model: string } }} Given */

export class Sealing {
  #base;
  #root;
  #token;
  #memory;
  #outer;
  /** @type {Trusted | null} */
  #trusted = null;
  /** @type {Uint8Array} */
  #routeKey = new Uint8Array();
  #fetchedAt = 0;
  #missedAt = -Infinity;
  #named = 0; // the highest version that a gateway named since the last fetch
  #doubted = false;
  #fetches = 0;
  /** @type {Promise<void> | null} */
  #fetching = null;
  #isHasty = false; // whether the running fetch is tried once only
  #scope = { since: -Infinity, salt: new Uint8Array(), offset: 0 };

  /**
   * @param {{ base: URL, root: Uint8Array }} connection @param {(asked: { renew: boolean }) => string | Promise<string>} token
   * @param {import("../trust/memory.js").Memory} memory @param {typeof fetch} outer
   */
  constructor({ base, root }, token, memory, outer) {
    this.#base = base;
    this.#root = root;
    this.#token = token;
    this.#memory = memory;
    this.#outer = outer;
  }

  /** The verified manifest; fetched if there is none or it is old. @param {AbortSignal} [signal] */
  async manifest(signal) {
    await this.#learn(signal);
    return this.#taken().manifest;
  }

  /** @param {Plain} plain @param {Given} given @returns {Promise<{ answer: SealedAnswer, info: Info }>} with its head */
  async exchange(plain, given) {
    const { options, signal } = given;
    const retries = new Retries({ number: options.retries, repeatable: isRepeatable(plain), endurance: given.endurance, lost: given.lost });
    const mended = new Set(); // causes that were mended already: none is tried twice
    let [attempts, passed] = [0, 0];
    for (;;) {
      await this.#learn(signal);
      const fetches = this.#fetches;
      const { manifest } = this.#taken();
      const asked = askedIn(manifest, plain, options);
      const ways = given.stays ? [given.stays] : await waysOf(manifest, plain, asked, options, this.#routeKey, clock());
      attempts += 1;
      try {
        const { answer, part } = await this.#attempt(plain, { ...ways[passed % ways.length], asked }, given, mended.has(INVALID_TOKEN));
        if (answer.problemType !== DATE || mended.has(DATE) || !this.#correct(valueOf(answer.head.fields, "date"))) {
          return { answer, info: { attempts, lost: retries.lost, parts: [part] } };
        }
        mended.add(DATE);
      } catch (error) {
        if (!(error instanceof LacreError)) throw error;
        if (error instanceof ProblemError && error.type === NO_WORKER && ++passed < ways.length) continue;
        if (error instanceof ProblemError && [OHTTP_KEY, UNKNOWN_POOL, INVALID_TOKEN].includes(error.type) && !mended.has(error.type)) {
          mended.add(error.type);
          if (error.type !== INVALID_TOKEN) await this.#refresh(fetches, signal);
          continue;
        }
        const pause = pauseAfter(error, retries);
        if (pause === null) throw Object.assign(error, { attempts });
        await waited(pause, signal);
      }
    }
  }

  /** @param {Plain} plain @param {Way} way @param {Given} given @param {boolean} renew */
  async #attempt(plain, way, { options, signal }, renew) {
    const trusted = this.#taken();
    const { request, outer, content, expected, part, verify } = await this.#seal(plain, way, options, trusted);
    const token = await this.#bearer(renew);
    const headers = { authorization: `Bearer ${token}`, ...outer };
    const response = await exchanged(this.#outer, new URL("/v1/sealed", this.#base), { method: "POST", headers, body: content, signal });
    part.requestId = response.headers.get("lacre-request-id");
    this.#heard(response.headers.get("lacre-manifest"));
    if (response.type === "opaqueredirect") throw new ProtocolError("the gateway answers with a redirect, which is not followed");
    if (response.status !== 200) throw await problemOf(response);
    if (mediaType(response.headers.get("content-type")) !== MEDIA_TYPE_RESPONSE || response.headers.get("content-encoding")) {
      await response.body?.cancel(); // unread (section 12)
      throw new ProtocolError("the gateway's 200 is not a sealed answer");
    }
    const answer = new SealedAnswer(response, await request.opener(), verify, signal);
    try {
      part.audit = await this.#proved(response.headers.get("lacre-audit"), { ...expected, ...speaksFor(token) }, trusted, signal);
      await answer.begin();
    } catch (error) {
      await response.body?.cancel().catch(() => undefined); // it may be locked or broken already
      throw error;
    }
    return { answer, part };
  }

  /** @param {Plain} plain @param {Way} way @param {Options} options @param {Trusted} trusted */
  async #seal(plain, way, options, { manifest }) {
    const pool = manifest.pools.get(way.pool);
    if (!pool) throw new NoUsableKeyError(`the manifest has no pool ${way.pool}: it has ${[...manifest.pools.keys()].join(", ") || "none"}`);
    const key = chooseKey(pool, options.kems, clock());
    const { shape } = options;
    if (!pool.shapes.includes(shape)) throw new NoUsableKeyError(`the pool ${way.pool} takes no request of shape ${shape}`);
    const prepared = prepare(plain, pool.models, { ...options, routed: way.model });
    const { action, model, maxTokens, isDefault } = prepared;
    const digests = digestsOf(model, pool.models.get(model)?.sha256 ?? [], pinOf(options.pinModels, way.asked, model));
    const asked = { "lacre-pool": way.pool, "lacre-model": model, "lacre-action": action, "lacre-shape": shape };
    const request = await SealedRequest.to(key.config);
    const salt = await this.#saltOf(options.cacheScope ?? userOf(plain));
    const inner = this.#inner(prepared, asked, salt);
    const { beginning } = prepared;
    /** @type {Record<string, string>} */
    const affinity = options.affinity && beginning ? { "lacre-affinity": await affinityOf(salt, way.pool, model, beginning) } : {};
    const content = await request.seal(shaped(encodeRequest(inner), shape));
    const digest = await request.digest();
    /** @type {Part} */
    const part = {
      ...{ pool: way.pool, model, action, shape, kem: key.config.kem.label, sealedBytes: content.length },
      ...{ manifestVersion: manifest.ver, requestId: null, audit: null, receipt: null },
    };
    return {
      request,
      content,
      part,
      outer: {
        ...{ "content-type": MEDIA_TYPE_REQUEST, accept: MEDIA_TYPE_RESPONSE, incremental: "?1", ...asked },
        ...{ "lacre-max-tokens": String(maxTokens), ...(isDefault ? { "lacre-max-tokens-default": "?1" } : {}), ...affinity },
      },
      expected: {
        ...{ kind: "intent", decision: "allow", enc: toBase64url(digest), sealed_bytes: content.length, kem: part.kem },
        ...{ pool: way.pool, model, action, max_tokens: maxTokens, shape },
      },
      /** @param {{ status: number }} head @param {import("../wire/bhttp.js").Field[]} trailers */
      verify: async (head, trailers) => {
        const receipt = await receiptOf(trailers, { key: key.receiptKey ?? pool.receiptKey, digest, ceiling: maxTokens });
        checkModel(receipt, model, digests, action !== "inspect" && head.status < 400);
        part.receipt = receipt;
      },
    };
  }

  /** The value of `lacre-cache-salt`. @param {string | null} user */
  async #saltOf(user) {
    const now = clock();
    if (!(now - this.#scope.since >= 0 && now - this.#scope.since < SALT_LIFETIME)) {
      this.#scope = { since: now, salt: randomBytes(16), offset: 0 };
    }
    const { salt } = this.#scope;
    return toHex(user === null ? salt : (await hmac(salt, utf8(user))).subarray(0, salt.length));
  }

  /** @param {import("./inner.js").Prepared} prepared @param {Record<string, string>} asked @param {string} salt */
  #inner({ plain, maxTokens, isDefault }, asked, salt) {
    /** @type {import("../wire/bhttp.js").Field[]} */
    const fields = [
      ...plain.headers,
      ["date", new Date((clock() + this.#scope.offset) * 1000).toUTCString()],
      ["lacre-cache-salt", salt],
      ...Object.entries(asked),
      [isDefault ? "lacre-most-tokens" : "lacre-max-tokens", String(maxTokens)],
    ];
    const { method, path, content } = plain;
    return { method, scheme: "https", authority: AUTHORITY, path, fields, content };
  }

  /** @param {boolean} renew */
  async #bearer(renew) {
    const token = await this.#token({ renew });
    if (typeof token !== "string" || !/^[!-~]+$/.test(token)) throw new ConfigurationError("the token is not visible ASCII");
    return token;
  }

  /** The gateway's key may have changed since: a newer manifest is fetched before it is accused. @param {string | null} header @param {Record<string, unknown>} expected @param {Trusted} trusted @param {AbortSignal | undefined} signal */
  async #proved(header, expected, trusted, signal) {
    const fetches = this.#fetches;
    try {
      return await proofOf(header, trusted.manifest.gatewayKeys, expected);
    } catch (error) {
      if (!(error instanceof InvalidAuditError)) throw error;
      this.#doubted = true; // if it cannot be fetched now, the next call fetches it
      await this.#refresh(fetches, signal, 0).catch((cause) => {
        if (!(cause instanceof LacreError)) throw cause;
      });
      return proofOf(header, this.#taken().manifest.gatewayKeys, expected);
    }
  }

  /** The version that the gateway named: unsigned, so it causes one fetch in a while. @param {string | null} version */
  #heard(version) {
    if (/^[0-9]{1,15}$/.test(version ?? "")) this.#named = Math.max(this.#named, Number(version));
  }

  /** RFC 9458 section 6.5.2. @param {string | undefined} date */
  #correct(date) {
    if (!DATE_FORM.test(date ?? "")) return false;
    const offset = Date.parse(/** @type {string} */ (date)) / 1000 - clock();
    if (!(Math.abs(offset) <= MAX_CORRECTION)) return false;
    this.#scope.offset = offset;
    return true;
  }

  #taken() {
    if (this.#trusted === null || this.#trusted.manifest.exp <= clock()) throw new ConfigurationError("there is no valid manifest");
    return this.#trusted;
  }

  #isStale() {
    if (this.#trusted === null || this.#doubted) return true;
    const [now, { exp, ver }] = [clock(), this.#trusted.manifest];
    const soon = (/** @type {number} */ since) => now - since >= 0 && now - since < REFRESH_PAUSE;
    if (soon(this.#missedAt) && now < exp) return false;
    if (this.#named > ver && !soon(this.#fetchedAt)) return true;
    return now >= this.#fetchedAt + (exp - this.#fetchedAt) / 2;
  }

  /** Makes sure that there is a valid manifest. While the present one is valid, a newer one is fetched beside the calls. @param {AbortSignal} [signal] */
  async #learn(signal) {
    if (!this.#isStale()) return;
    const holds = !this.#doubted && this.#trusted !== null && clock() < this.#trusted.manifest.exp;
    if (!holds) return this.#refresh(this.#fetches, signal);
    this.#refresh(this.#fetches, undefined, 0).catch((error) => {
      if (error instanceof NetworkError || error instanceof ProblemError) this.#missedAt = clock();
      else this.#doubted = true; // the next call fetches it itself, and throws what is wrong
    });
  }

  /** All calls that need a manifest share one fetch. @param {number} fetches those that the call has seen @param {AbortSignal} [signal] @param {number | null} [number] of tries */
  async #refresh(fetches, signal, number = null) {
    if (this.#fetching && this.#isHasty && number !== 0) await unless(signal, this.#fetching.catch(() => undefined));
    if (fetches !== this.#fetches) return;
    if (!this.#fetching) this.#isHasty = number === 0;
    await unless(signal, (this.#fetching ??= this.#fetch(number).finally(() => (this.#fetching = null))));
  }

  /** @param {number | null} number */
  async #fetch(number) {
    const retries = new Retries({ number, repeatable: true });
    for (;;) {
      try {
        const document = await within(FETCH_LIMIT, "the manifest", (signal) => this.#document(signal));
        const { trusted, routeKey } = await accept(document, this.#root, this.#memory);
        [this.#trusted, this.#routeKey, this.#fetchedAt, this.#doubted, this.#named] = [trusted, routeKey, clock(), false, 0];
        this.#fetches += 1;
        return;
      } catch (error) {
        const pause = pauseAfter(error, retries);
        if (pause === null) throw error;
        await waited(pause, undefined);
      }
    }
  }

  /** @param {AbortSignal} signal */
  async #document(signal) {
    const response = await exchanged(this.#outer, new URL("/v1/manifest", this.#base), { method: "GET", signal });
    if (response.type === "opaqueredirect") throw new ProtocolError("the manifest's address redirects, which is not followed");
    if (response.status !== 200) throw await problemOf(response);
    return readUpTo(response, MAX_DOCUMENT, "the manifest document");
  }
}

/** Waits for the work unless the signal aborts. @param {AbortSignal | undefined} signal @param {Promise<unknown>} work */
const unless = async (signal, work) => (signal ? Promise.race([work, rejectedBy(signal, work)]) : work);

/** @param {unknown} error @param {Retries} retries */
function pauseAfter(error, retries) {
  if (error instanceof ProblemError) return retries.afterProblem(error);
  if (error instanceof NetworkError || error instanceof TruncatedError) return retries.afterFailure(error);
  return null;
}

/** Rejects when the signal aborts, and no longer than `until` takes. @param {AbortSignal} signal @param {Promise<unknown>} until @returns {Promise<never>} */
function rejectedBy(signal, until) {
  return new Promise((_, reject) => {
    signal.throwIfAborted();
    const gone = () => reject(signal.reason);
    signal.addEventListener("abort", gone, { once: true });
    const done = () => signal.removeEventListener("abort", gone);
    until.then(done, done);
  });
}
