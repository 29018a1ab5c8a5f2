/** `lacre://host[:port]?trust=…` (docs/wire.md section 2): where the gateway is, and the root key that the caller pins. */

import { ConfigurationError } from "../errors.js";
import { fromBase64url } from "../wire/bytes.js";

const LOOPBACK = /^(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])$/i;
const NAME = /^(?=.{1,253}$)[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)*$/i; // RFC 1123, and `_` as in DNS
const FORM = "a connection string is lacre://host[:port]?trust=KEY";

/** @param {string} text @returns {{ base: URL, root: Uint8Array }} */
export function parseConnectionString(text) {
  const match = /^(lacre|lacre\+http):\/\/([^/?#@%\s\\]+)\/?\?([^#]*)$/i.exec(typeof text === "string" ? text.trim() : "");
  if (!match) throw new ConfigurationError(FORM);
  const [, scheme, host, query] = match;
  const trusts = new URLSearchParams(query).getAll("trust");
  const root = trusts.length === 1 ? fromBase64url(trusts[0]) : null;
  if (root?.length !== 32) throw new ConfigurationError("a connection string has exactly one trust, a key of 32 bytes");
  let base;
  try {
    base = new URL(`${scheme.toLowerCase() === "lacre" ? "https" : "http"}://${host}`);
  } catch (cause) {
    throw new ConfigurationError(`${host} is not a host with an optional port; ${FORM}`, { cause });
  }
  if (!base.hostname.startsWith("[") && !NAME.test(base.hostname.replace(/\.$/, ""))) throw new ConfigurationError(`${base.hostname} is not a host name`);
  if (base.protocol === "http:" && !LOOPBACK.test(host.replace(/:[0-9]*$/, ""))) {
    throw new ConfigurationError(`lacre+http: is for loopback addresses only, not for ${base.hostname}: use lacre: (TLS)`);
  }
  return { base, root };
}
