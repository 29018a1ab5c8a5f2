// Brings the parts marked `data-live` up to date, while someone looks at the page. Each time is a view like any other: decided by
// policy and recorded. The new page is parsed, never run.

const EVERY = 15_000; // ms
const note = document.querySelector("[data-live-note]");

async function renew() {
  const answer = await fetch(location.href, { headers: { accept: "text/html" }, redirect: "manual" });
  if (!answer.ok) {
    throw new Error(String(answer.status));
  }
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const fresh = page.querySelector(`[data-live="${part.dataset.live}"]`);
    if (fresh !== null && !part.contains(document.activeElement)) {
      part.replaceWith(document.importNode(fresh, true));
    }
  }
}

async function turn() {
  if (document.visibilityState === "visible") {
    try {
      await renew();
      if (note !== null) note.textContent = `updated ${new Date().toISOString().slice(11, 19)} UTC`;
    } catch {
      if (note !== null) note.textContent = "not up to date: reload the page";
    }
  }
  setTimeout(turn, EVERY);
}

document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
if (document.querySelector("[data-live]") !== null) {
  setTimeout(turn, EVERY);
}
// At the document, because live parts bring forms of their own.
document.addEventListener("submit", (event) => {
  const sure = event.target.dataset.sure;
  if (sure !== undefined && !confirm(sure)) event.preventDefault();
});
