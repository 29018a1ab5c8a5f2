/** Sealed access to self-hosted language models. Written from docs/wire.md. */

export * from "./errors.js";
export { ProcessMemory } from "./trust/memory.js";
export { BASE_URL, infoOf, refusalOf, sealedFetch } from "./sealed_fetch.js";
/** @typedef {import("./sealed_fetch.js").ClientOptions} ClientOptions */
/** @typedef {import("./sealed_fetch.js").CallOptions} CallOptions */
/** @typedef {import("./sealed_fetch.js").SealedFetch} SealedFetch */
/** @typedef {import("./exchange/sealing.js").Info} Info */
