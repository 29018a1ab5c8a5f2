/**
 * The lock: what was verified, in the order of the checks. It shows what the SDK checked, and says what was not.
 */

import { dialog } from "./dialog.js";
import { copied, h, icon, iconButton, saved } from "./dom.js";

const SHORT = 12;

/** The text of the lock in the page's head. @param {any} verification @param {any} error */
export function lockLine(verification, error) {
  if (!verification?.manifest) return { shape: "unlocked", text: error ? "Gateway away" : "Not verified yet", more: "" };
  return { shape: "lock", text: "Sealed", more: ` · manifest v${verification.manifest.version}` };
}

/** @param {any} state @param {any} facts of an answer, or null for the checks so far */
export function showProof(state, facts) {
  const checked = facts?.verification ?? state.verification;
  const rows = [...trust(checked), ...sealing(checked, facts), ...evidence(checked, facts, state)];
  const all = rows.every((row) => row.ok !== false) && !facts?.imported;
  const title = facts ? "What was verified of this answer" : "What this page verified";
  dialog(
    title,
    h(
      "div",
      { class: "proof-body" },
      summary(checked, facts, all),
      !facts && state.error && note("unlocked", [state.error.message, state.error.remedy].filter((text, i, all) => !i || !all[0].includes(text)).join(" "), "warn"),
      h("dl", { class: "checks" }, ...rows.map(row)),
      facts && resumed(facts),
      facts && kept(facts),
      h(
        "p",
        { class: "quiet" },
        "The gateway routes what you write and cannot read it. A worker reads it, because it answers it. A receipt shows who counted; it does not prove the count.",
      ),
    ),
  );
}

function summary(checked, facts, all) {
  if (facts?.imported) return note("unlocked", "These checks came with an imported file. This page did not make them.", "warn");
  if (!checked?.manifest) return note("unlocked", "Nothing was verified yet: the gateway gave no manifest.", "warn");
  if (!facts) return note("lock", "Your next message is sealed to the key below. Nothing was sent yet.", "good");
  return note("lock", all ? "Every check held, from the pinned root to the audit log." : "Every check that could be made held. The rest is named below.", "good");
}

function note(shape, text, kind) {
  return h("p", { class: `summary ${kind}` }, icon(shape), text);
}

function row({ ok, what, value, detail, whole }) {
  const copy = whole && iconButton("copy", `Copy ${what}`, () => copied(whole, copy), { class: "icon-button small" });
  return h(
    "div",
    { class: `check ${ok === null ? "told" : ok ? "held" : "open"}` },
    h("dt", {}, h("span", { class: "mark", "aria-hidden": "true" }, ok === null ? "·" : ok ? "✓" : "–"), what, h("span", { class: "hidden-text" }, ok === null ? "" : ok ? " (verified)" : " (not there)")),
    h("dd", {}, h("span", { class: whole ? "digest" : "", title: whole ?? "" }, value), copy, detail && h("span", { class: "detail" }, detail)),
  );
}

const short = (text) => (text && text.length > SHORT + 1 ? `${text.slice(0, SHORT)}…` : (text ?? ""));
const held = (what, value, detail, whole) => ({ ok: true, what, value, detail, whole });
const fact = (what, value, detail) => ({ ok: null, what, value, detail }); // nobody signed it
const open = (what, value, detail) => ({ ok: false, what, value, detail });

function trust(checked) {
  const signed = checked?.manifest;
  const found = [checked ? held("Root key", short(checked.pinned), "pinned by your connection string", checked.pinned) : open("Root key", "none")];
  if (!signed) return [...found, open("Manifest", "none was verified")];
  if (signed.root !== checked.pinned) found.push(held("Root key now", short(signed.root), "the pinned root handed over to it", signed.root));
  found.push(held("Signer", short(signed.signer), `until ${date(signed.signer_expires_at)}`, signed.signer));
  found.push(held("Manifest", `version ${signed.version}`, `signed ${span(signed.age)} before this check, by ${signed.issuer}; valid until ${date(signed.expires_at)}`));
  return found;
}

function sealing(checked, facts) {
  const key = checked?.sealed_to;
  if (!key) return [open("Sealed to", "no message yet")];
  const shape = facts?.exchange?.shape;
  return [
    held("Sealed to", `pool ${key.pool}`, `until ${date(key.not_after)}`),
    held("Key", short(key.key), key.kem, key.key),
    ...(shape ? [fact("Shape", shape === "none" ? "lengths are visible" : `${shape}: lengths are hidden`, `${facts.exchange.sealed_bytes} bytes left this computer, sealed`)] : []),
  ];
}

function evidence(checked, facts, state) {
  const { receipt, audit } = checked ?? {};
  if (!facts) return [];
  const used = receipt && `${receipt.prompt_tokens} + ${receipt.completion_tokens} tokens`;
  const cached = receipt?.cached_tokens ? `, ${receipt.cached_tokens} from the cache` : "";
  const pinned = Object.values(state.pinned ?? {}).includes(receipt?.model);
  return [
    receipt ? held("Receipt", used, `signed by the pool${cached}; ended ${date(receipt.end)}`) : open("Receipt", "none"),
    receipt?.model
      ? held("Weights", short(receipt.model.replace("sha256:", "")), pinned ? "the file that you pinned" : "named by the receipt; pin it with --pin-model", receipt.model)
      : open("Weights", "no digest", "the worker named no file"),
    audit
      ? held("Audit log", `entry ${audit.index}`, "the gateway recorded this request, under a signed checkpoint")
      : open("Audit log", "no proof"),
    ...(facts.exchange?.request_id ? [{ ok: null, what: "Request", value: facts.exchange.request_id, detail: `${facts.exchange.attempts} sealed request${facts.exchange.attempts === 1 ? "" : "s"}; the id is the gateway's, and nobody signed it` }] : []),
  ];
}

function resumed(facts) {
  if (!facts.parts?.length) return null;
  const told = facts.parts.map((part, i) => h("li", {}, `part ${i + 1}: ${part.prompt} + ${part.completion} tokens`));
  return h("div", { class: "parts" }, h("p", {}, "Another worker resumed the answer. These requests broke off before:"), h("ul", {}, ...told));
}

function kept(facts) {
  const receipts = facts.receipts?.filter(Boolean) ?? [];
  if (receipts.length === 0 && !facts.audit) return null;
  return h(
    "div",
    { class: "row" },
    receipts.length > 0 && h("button", { type: "button", class: "button", onclick: () => saved("receipt.jws", receipts.join("\n") + "\n", "text/plain") }, "Save receipt"),
    facts.audit && h("button", { type: "button", class: "button", onclick: () => saved("audit-proof.txt", facts.audit, "text/plain") }, "Save audit proof"),
  );
}

function date(seconds) {
  return new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

function span(seconds) {
  for (const [size, unit] of [[86400, "days"], [3600, "hours"], [60, "minutes"]]) if (seconds >= 2 * size) return `${Math.round(seconds / size)} ${unit}`;
  return `${Math.round(seconds)} s`;
}
