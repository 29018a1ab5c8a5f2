/** A gateway that does not serve its manifest holds no call up for ever, and none at all while the held manifest is valid. */

import { deepStrictEqual as same, ok, rejects } from "node:assert";
import { test } from "node:test";

import { BASE_URL, NetworkError, refusalOf, TrustError } from "../../sdk/javascript/src/index.js";
import { LocalGateway, MANIFEST, refusal, SEALED } from "./gateway.mjs";

const never = () => new Promise(() => undefined);
const endless = () => new Response(new ReadableStream({ pull: never }));
const ask = (fetch, more = {}) => fetch(`${BASE_URL}/chat/completions`, { method: "POST", body: '{"messages": []}', ...more });
const turn = () => new Promise((resolve) => setImmediate(resolve));
const HALF = 31 * 60 * 1000; // of a manifest's validity, in milliseconds

/** Waits until the condition holds, for a while. */
async function until(condition) {
  for (let i = 0; i < 1000; i++) {
    if (await condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  throw new Error("it did not come to be");
}

/** Settles as the promise does, or fails after some seconds. */
async function soon(promise) {
  let timer;
  const late = new Promise((_, reject) => (timer = setTimeout(reject, 8000, new Error("it still waits"))));
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/** What a promise came to, while the mocked timers run for five minutes. */
async function inFiveMinutes(timers, promise) {
  let outcome = "it still waits";
  promise.then(() => (outcome = "done"), (error) => (outcome = error));
  for (let second = 0; second < 300; second++) {
    timers.tick(1000);
    for (let i = 0; i < 5; i++) await turn();
  }
  return outcome;
}

test("a manifest that does not come, or not whole, is given up", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  for (const [manifest, what] of [[never, "no head"], [endless, "no end of the body"]]) {
    const gateway = new LocalGateway({ manifest });
    ok((await inFiveMinutes(t.mock.timers, gateway.client())) instanceof NetworkError, what);
    same(gateway.paths, [MANIFEST, MANIFEST, MANIFEST], "as another failure: it is tried again twice");
  }
  const refused = () => new Response(endless().body, { status: 503, headers: { "content-type": "application/problem+json" } });
  ok((await inFiveMinutes(t.mock.timers, new LocalGateway({ manifest: refused }).client())) instanceof NetworkError, "a refusal");
});

/** A client that holds a valid manifest, which is due to be fetched again. The next fetch gets what `settle` is called with. */
async function due(t) {
  t.mock.timers.enable({ apis: ["Date"], now: Date.now() });
  const gateway = new LocalGateway();
  const fetch = await gateway.client();
  t.mock.timers.tick(HALF);
  let settle;
  gateway.manifest = () => new Promise((resolve, reject) => (settle = { resolve, reject }));
  return { gateway, fetch, settle: (how, what) => settle[how](what) };
}

test("calls use the held manifest while a newer one is fetched", async (t) => {
  const { gateway, fetch, settle } = await due(t);
  for (let i = 0; i < 2; i++) same(refusalOf(await soon(ask(fetch)))?.status, 403);
  same(gateway.paths, [MANIFEST, MANIFEST, SEALED, SEALED], "both calls share one fetch");
  settle("resolve", new Response(gateway.document(2)));
  gateway.manifest = never; // it is not asked again
  await until(async () => (await soon(fetch.manifest())).ver === 2);
});

test("a fetch beside the calls may fail, and is not repeated at once", async (t) => {
  const { gateway, fetch, settle } = await due(t);
  await soon(ask(fetch));
  settle("reject", new TypeError("the network is away"));
  for (let i = 0; i < 20; i++) await turn();
  gateway.manifest = never;
  same(refusalOf(await soon(ask(fetch)))?.status, 403);
  same(gateway.paths.filter((path) => path === MANIFEST).length, 2);
});

test("a manifest that is not to be trusted ends the next call, also if it was fetched beside one", async (t) => {
  const { gateway, fetch, settle } = await due(t);
  await soon(ask(fetch));
  gateway.manifest = () => new Response(gateway.forged());
  settle("resolve", gateway.manifest());
  let refused = null;
  const again = () => ask(fetch).catch((error) => (refused = error));
  await until(async () => (await soon(again()), refused !== null));
  ok(refused instanceof TrustError);
});

test("a refusal that asks for a new manifest waits for it, and does not fail with a fetch that began beside the call", async (t) => {
  const { gateway, fetch, settle } = await due(t);
  const patient = fetch.with({ retries: null });
  let sealed = 0;
  gateway.sealed = () => refusal(sealed++ ? undefined : "urn:lacre:problem:unknown-pool");
  const call = ask(patient);
  await until(() => sealed === 1);
  gateway.manifest = () => new Response(gateway.document(2));
  settle("reject", new TypeError("the network is away"));
  same(refusalOf(await soon(call))?.type, "urn:lacre:problem:forbidden");
  same(gateway.paths, [MANIFEST, MANIFEST, SEALED, MANIFEST, SEALED]);
});

test("the caller's signal ends a call that waits for a manifest, also one that would prove its answer", async (t) => {
  const { gateway, fetch, settle } = await due(t);
  gateway.sealed = () => new Response("", { headers: { "content-type": "message/ohttp-chunked-res" } }); // without a proof
  const leaving = new AbortController();
  const call = ask(fetch, { signal: leaving.signal });
  await until(() => gateway.paths.includes(SEALED));
  for (let i = 0; i < 20; i++) await turn();
  leaving.abort(new Error("enough"));
  await rejects(soon(call), /enough/);
  settle("reject", new TypeError("the network is away"));
});
