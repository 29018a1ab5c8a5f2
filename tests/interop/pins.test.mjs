/** Pinned model files hold under the name that the caller asked for, and under the pool's (docs/routes.md). */

import { deepStrictEqual as same, rejects } from "node:assert";
import { test } from "node:test";

import { BASE_URL, ConfigurationError, refusalOf, WrongModelError } from "../../sdk/javascript/src/index.js";
import { LocalGateway, MANIFEST, SEALED } from "./gateway.mjs";

const [FILE, OTHER] = ["1".repeat(64), "2".repeat(64)];
const [PIN, OTHER_PIN] = [`sha256:${FILE}`, `sha256:${OTHER}`];
const ROUTES = { assistant: { pools: [{ pool: "default", model: "m" }] } };

/** The gateway's paths, once a client with these pins has asked for the model. */
async function asked(model, pinModels, models, more = {}) {
  const gateway = new LocalGateway({ models, routes: ROUTES });
  const fetch = await gateway.client({ pinModels, ...more });
  const body = JSON.stringify({ model, messages: [] });
  try {
    same(refusalOf(await fetch(`${BASE_URL}/chat/completions`, { method: "POST", body }))?.status, 403);
  } catch (error) {
    return [error.constructor, gateway.paths];
  }
  return [null, gateway.paths];
}

const SENT = [null, [MANIFEST, SEALED]];
const REFUSED = [WrongModelError, [MANIFEST]];

test("a pin holds under the route's name and under the pool's", async () => {
  const [listed, unlisted] = [{ m: [FILE] }, { m: [] }];
  same(await asked("assistant", { assistant: PIN }, listed), SENT);
  same(await asked("assistant", { assistant: OTHER_PIN }, listed), REFUSED);
  same(await asked("assistant", { m: OTHER_PIN }, listed), REFUSED);
  same(await asked("assistant", { assistant: OTHER_PIN }, listed, { pool: "default" }), REFUSED, "in a pool that the caller chose");
  same(await asked("assistant", { assistant: PIN, m: PIN }, unlisted), SENT);
  same(await asked("assistant", { assistant: PIN, m: OTHER_PIN }, unlisted), REFUSED, "the two pins differ");
  same(await asked("m", { assistant: OTHER_PIN, m: PIN }, listed), SENT, "the pin of another name");
});

test("a model may have the name of something that every object inherits", async () => {
  for (const name of ["constructor", "toString", "hasOwnProperty"]) same(await asked(name, {}, { [name]: [FILE] }), SENT, name);
});

test("pins that name no file are refused, and not passed over", async () => {
  for (const pinModels of [{ m: undefined }, { m: "1".repeat(64) }, { m: `${PIN}0` }, { m: PIN.toUpperCase() }, new Map([["m", PIN]]), [PIN], PIN]) {
    await rejects(new LocalGateway().client({ pinModels }), ConfigurationError, String(pinModels));
  }
});
