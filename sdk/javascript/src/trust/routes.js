/** Which pools a model's name leads to (docs/wire.md section 3): what the manifest says, and the order for one call. */

import { TrustError } from "../errors.js";
import { ascii, concat, utf8 } from "../wire/bytes.js";
import { hmac } from "../wire/ohttp.js";
import { count, list, object, text } from "./json.js";

/** @typedef {{ pool: string, model: string, share: number }} Way */
/** @typedef {{ ways: Way[], sticky: boolean }} Route */

const MAX_ROUTES = 256;
const MAX_WAYS = 8;
const MAX_SHARE = 1000000;
const BITS = 53; // of a draw: what a number holds exactly

/** @param {unknown} name */
export const isName = (name) => typeof name === "string" && /^[!-~]{1,128}$/.test(name);

/** The member `routes` by name; none if it is missing. @param {any} routes @returns {Map<string, Route>} */
export function readRoutes(routes) {
  if (routes === undefined) return new Map();
  const found = Object.entries(object(routes, "routes"));
  if (found.length > MAX_ROUTES) throw new TrustError(`more than ${MAX_ROUTES} routes`);
  return new Map(found.map(([name, route]) => [name, readRoute(name, object(route, "a route"))]));
}

/** @param {string} name @param {Record<string, any>} route @returns {Route} */
function readRoute(name, { pools, sticky = true }) {
  if (!isName(name)) throw new TrustError("a route's name does not have 1 to 128 visible ASCII characters");
  if (typeof sticky !== "boolean") throw new TrustError("sticky is not true or false");
  const ways = list(pools, "pools", MAX_WAYS).map((way) => readWay(name, object(way, "an entry of a route")));
  if (ways.length < 1) throw new TrustError("a route has no pool");
  if (new Set(ways.map(({ pool, model }) => `${pool} ${model}`)).size < ways.length) {
    throw new TrustError("a route names a pool's model twice");
  }
  return { ways, sticky };
}

/** @param {string} name @param {Record<string, any>} way */
function readWay(name, { pool, model = name, share = 0 }) {
  if (!isName(pool) || !isName(model)) throw new TrustError("a pool or its model does not have 1 to 128 visible ASCII characters");
  return { pool: text(pool, "pool"), model, share: count(share, "share", 0, MAX_SHARE) };
}

/**
 * The entry that the draw falls on, then the others in their order. A draw depends only on the seed, and an entry whose share grows
 * takes from the others and loses nothing: times with an exponential distribution, whose rates are the shares.
 * @param {Way[]} ways @param {Uint8Array} seed
 */
export async function ordered(ways, seed) {
  const waits = await Promise.all(ways.map((way) => waitOf(way, seed)));
  const drawn = ways[waits.indexOf(Math.min(...waits))]; // the first if no one has a share
  return [drawn, ...ways.filter((way) => way !== drawn)];
}

/** @param {Way} way @param {Uint8Array} seed */
async function waitOf({ pool, model, share }, seed) {
  if (share === 0) return Infinity;
  const named = await hmac(seed, ascii(`${pool}\0${model}`));
  const drawn = Number(new DataView(named.buffer).getBigUint64(0) >> BigInt(64 - BITS)) + 0.5;
  return -Math.log(drawn / 2 ** BITS) / share;
}

/**
 * The seed of one user. Without the key a draw tells nothing of the user.
 * @param {Uint8Array} key @param {string} route @param {string | null} user null: the program itself
 */
export function stickySeed(key, route, user) {
  return hmac(key, concat([ascii(`lacre route 1\0${route}`), user === null ? new Uint8Array() : utf8(`\0${user}`)]));
}
