/** A call leaves nothing on the caller's signal, which may be the one of a whole program. */

import { deepStrictEqual as same, rejects } from "node:assert";
import { getEventListeners } from "node:events";
import { test } from "node:test";

import { BASE_URL, refusalOf } from "../../sdk/javascript/src/index.js";
import { LocalGateway } from "./gateway.mjs";

test("a call that fails or is refused leaves no listener on the caller's signal", async () => {
  const gateway = new LocalGateway();
  const fetch = await gateway.client();
  const { signal } = new AbortController();
  const ask = (options = {}) => fetch.with(options)(`${BASE_URL}/chat/completions`, { method: "POST", body: '{"messages": []}', signal });
  same(refusalOf(await ask())?.status, 403);
  same(getEventListeners(signal, "abort").length, 0, "refused");
  gateway.sealed = () => Promise.reject(new TypeError("the network is away"));
  await rejects(ask(), { name: "NetworkError" });
  same(getEventListeners(signal, "abort").length, 0, "no answer");
  await rejects(ask({ pool: "elsewhere" }), { name: "NoUsableKeyError" });
  same(getEventListeners(signal, "abort").length, 0, "not sent");
});
