/** Dialogs: the browser's own element keeps the focus inside and closes on Escape. */

import { h, iconButton } from "./dom.js";

let serial = 0;

/** Shows a dialog with a title. Returns it. */
export function dialog(title, body, { wide = false, onclose = () => {} } = {}) {
  const name = `dialog-${(serial += 1)}`;
  const element = h(
    "dialog",
    { class: wide ? "dialog wide" : "dialog", "aria-labelledby": name },
    h("div", { class: "dialog-head" }, h("h2", { id: name }, title), iconButton("close", "Close", () => element.close())),
    h("div", { class: "dialog-body", tabindex: "0", role: "group", "aria-labelledby": name }, body),
  );
  element.addEventListener("click", (event) => event.target === element && element.close());
  element.addEventListener("close", () => [element.remove(), onclose()]);
  document.body.append(element);
  element.showModal();
  return element;
}

/** Asks before something is lost. */
export function confirmed(title, text, label) {
  return new Promise((resolve) => {
    let answer = false;
    const yes = () => [(answer = true), element.close()];
    const element = dialog(
      title,
      h(
        "div",
        {},
        h("p", {}, text),
        h("div", { class: "row end" }, h("button", { type: "button", class: "button", onclick: () => element.close() }, "Cancel"), h("button", { type: "button", class: "button danger", onclick: yes }, label)),
      ),
      { onclose: () => resolve(answer) },
    );
  });
}
