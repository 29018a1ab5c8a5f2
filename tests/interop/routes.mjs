/** Which pools a model's name leads to (section 3 of wire.md): what the manifest says, and the order for one call. */

import { randomInt } from "node:crypto";

import { TrustError } from "./errors.mjs";

const MAX_ROUTES = 256;
const MAX_WAYS = 8;
const MAX_SHARE = 1000000;
const isName = (name) => typeof name === "string" && /^[!-~]{1,128}$/.test(name);

/** The member `routes` by name; none if it is missing. */
export function readRoutes(routes) {
  if (routes === undefined) return new Map();
  const found = Object.entries(table(routes, "routes"));
  if (found.length > MAX_ROUTES) throw new TrustError(`more than ${MAX_ROUTES} routes`);
  return new Map(found.map(([name, route]) => [name, readRoute(name, table(route, "a route"))]));
}

function readRoute(name, { pools, sticky = true }) {
  if (!isName(name)) throw new TrustError("a route's name has 1 to 128 visible ASCII characters");
  if (typeof sticky !== "boolean") throw new TrustError("sticky is not a truth value");
  if (!Array.isArray(pools) || pools.length < 1 || pools.length > MAX_WAYS) throw new TrustError(`a route has 1 to ${MAX_WAYS} pools`);
  const ways = pools.map((way) => readWay(name, table(way, "an entry of a route")));
  if (new Set(ways.map(({ pool, model }) => `${pool} ${model}`)).size < ways.length) throw new TrustError("a pool's model twice");
  return ways;
}

function readWay(name, { pool, model = name, share = 0 }) {
  if (!isName(pool) || !isName(model)) throw new TrustError("a pool and its model have 1 to 128 visible ASCII characters");
  if (!Number.isInteger(share) || share < 0 || share > MAX_SHARE) throw new TrustError(`a share is 0 to ${MAX_SHARE}`);
  return { pool, model, share };
}

function table(value, what) {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new TrustError(`${what}: not an object`);
  return value;
}

/** The entry that the draw falls on, then the others in their order. draw: gives a number from 0 to below its argument. */
export function ordered(ways, draw = randomInt) {
  const total = ways.reduce((sum, { share }) => sum + share, 0);
  let left = total === 0 ? 0 : draw(total);
  const drawn = total === 0 ? ways[0] : ways.find(({ share }) => (left -= share) < 0);
  return [drawn, ...ways.filter((way) => way !== drawn)];
}
