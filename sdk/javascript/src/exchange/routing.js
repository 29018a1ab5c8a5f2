/** Where a call may go: the caller's pool, or those of the route that has the model's name (docs/wire.md section 3). And pins. */

import { NoUsableKeyError, WrongModelError } from "../errors.js";
import { ordered, stickySeed } from "../trust/routes.js";
import { randomBytes } from "../wire/bytes.js";
import { askedModel, userOf } from "./inner.js";

const DEFAULT_POOL = "default";

/**
 * The name that the caller asks for; null if there are no routes, where it makes no difference.
 * @param {import("../trust/manifest.js").Manifest} manifest @param {import("./inner.js").Plain} plain
 * @param {import("./sealing.js").Options} options
 */
export const askedIn = (manifest, plain, options) =>
  manifest.routes.size ? askedModel(plain, manifest.pools.get(options.pool ?? DEFAULT_POOL)?.models, options.model) : null;

/**
 * @param {import("../trust/manifest.js").Manifest} manifest @param {import("./inner.js").Plain} plain @param {string | null} asked
 * @param {import("./sealing.js").Options} options @param {Uint8Array} key @param {number} now
 * @returns {Promise<{ pool: string, model?: string }[]>}
 */
export async function waysOf(manifest, plain, asked, options, key, now) {
  const chosen = options.pool;
  const mine = manifest.pools.get(chosen ?? DEFAULT_POOL);
  const route = asked === null ? undefined : manifest.routes.get(asked);
  if (route === undefined || asked === null) return [{ pool: chosen ?? DEFAULT_POOL }];
  if (chosen !== undefined) {
    const named = mine?.models.has(asked) ? undefined : route.ways.find(({ pool }) => pool === chosen)?.model;
    return [{ pool: chosen, model: named }];
  }
  const seed = route.sticky ? await stickySeed(key, asked, options.cacheScope ?? userOf(plain)) : randomBytes(32);
  const there = (await ordered(route.ways, seed)).filter(({ pool }) => manifest.pools.has(pool));
  if (!there.length) throw new NoUsableKeyError(`no pool of the route ${asked} is in the manifest`);
  const usable = there.filter(({ pool }) => {
    const { shapes = [], keys = [] } = manifest.pools.get(pool) ?? {};
    const current = keys.some(({ config, notAfter }) => notAfter > now && config && options.kems.includes(config.kem.name));
    return shapes.includes(options.shape) && current;
  });
  return (usable.length ? usable : there).map(({ pool, model }) => ({ pool, model }));
}

/**
 * The digest that the caller pinned, for the name that it asked for or for the pool's. Throws if the two differ.
 * @param {Map<string, string>} pins @param {string | null} asked @param {string} model
 */
export function pinOf(pins, asked, model) {
  const [byName, byModel] = [asked === null ? undefined : pins.get(asked), pins.get(model)];
  if (byName !== undefined && byModel !== undefined && byName !== byModel) {
    throw new WrongModelError(`\`pinModels\` has one file for ${asked} and another for ${model}, to which the route leads; nothing was sent`);
  }
  return byName ?? byModel;
}
