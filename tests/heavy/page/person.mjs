/**
 * A person at the chat page, against a real model: prints what each step saw.
 *
 *     CHROMIUM=… LINK=http://127.0.0.1:…/?key=… ORIGIN=http://127.0.0.1:… node person.mjs
 */

import { readFileSync, writeFileSync } from "node:fs";
import { env } from "node:process";

import { ask, checked, ended, launched, opened, pictured, sent, told } from "./browser.mjs";

const browser = await launched();
const STORY = "Write a very long story about a lighthouse keeper and the sea, with many chapters.";

try {
  const page = await opened(browser, { colorScheme: "light" });

  // In by the link, which is gone from the address
  await page.goto(env.LINK);
  await page.getByRole("heading", { name: "What would you like to ask?" }).waitFor();
  await page.locator(".lock.lock").getByText("Sealed").waitFor();
  told.address = page.url();
  told.lock = await page.locator(".lock").innerText();
  await checked(page, "welcome");
  await pictured(page, "welcome-wide-light");

  // A small model can write without an end: new chats take over what is set here
  await page.keyboard.press("Alt+,");
  await page.getByLabel("Longest answer").fill("150");
  await page.getByLabel("Temperature").fill("0");
  await page.keyboard.press("Escape");

  // A question, and what was verified of its answer
  await sent(page, "Name three seas. Answer with a short list.");
  await page.locator('article.assistant[aria-busy="true"]').waitFor();
  const first = await ended(page);
  told.first = { text: await first.locator(".markdown").innerText(), figures: await first.locator(".figures").innerText() };
  told.spoken = await page.locator("#status").innerText();
  await checked(page, "answer");
  await pictured(page, "answer-wide-light");
  await first.getByRole("button", { name: /What was verified/ }).click();
  told.proof = await page.locator(".check").evaluateAll((rows) => rows.map((row) => [row.classList.contains("held"), row.querySelector("dt").innerText, row.querySelector("dd").innerText]));
  told.summary = await page.locator(".summary").innerText();
  await checked(page, "proof");
  await pictured(page, "proof-wide-light");
  await page.keyboard.press("Escape");
  await page.locator("dialog").waitFor({ state: "detached" }); // its event comes a moment after the key
  told.closed = await page.locator("dialog").count();

  // Stopping keeps what came
  await sent(page, STORY);
  await page.waitForFunction(() => [...document.querySelectorAll("article.assistant .markdown")].at(-1).innerText.length > 60);
  await page.keyboard.press("Escape");
  const stopped = await ended(page);
  told.stopped = { kept: (await stopped.locator(".markdown").innerText()).length > 30, says: await stopped.locator(".quiet").first().innerText() };

  // Editing the first question branches; asking again does too
  const question = page.locator("article.user").first();
  await question.hover();
  await question.getByRole("button", { name: "Edit and branch" }).click();
  await page.getByRole("textbox", { name: "Edit your question" }).fill("Name one colour.");
  await pictured(page, "edit-wide-light");
  await page.getByRole("button", { name: "Send as a new branch" }).click();
  await ended(page);
  told.branches = await page.locator(".branch-count").allInnerTexts();
  await page.getByRole("button", { name: "Ask again" }).last().click();
  await ended(page);
  told.again = await page.locator(".branch-count").allInnerTexts();
  await page.getByRole("button", { name: "Previous branch" }).first().click();
  await page.getByText(STORY).first().waitFor();
  told.back = await page.locator("article.user .bubble").allInnerTexts();
  await page.getByRole("button", { name: "Next branch" }).first().click();
  await page.locator("article.user .bubble").getByText("Name one colour.").waitFor();

  // A reload finds all of it, and what was typed and not sent
  await page.getByRole("textbox", { name: "Message" }).fill("not sent yet");
  await page.waitForTimeout(1500);
  const before = await page.locator(".messages").innerText();
  await page.reload();
  await page.locator("article.assistant .markdown").first().waitFor();
  told.reloaded = { same: (await page.locator(".messages").innerText()) === before, draft: await page.getByRole("textbox", { name: "Message" }).inputValue() };

  // Two windows of one chat: neither loses what the other wrote
  const second = await page.context().newPage();
  await second.goto(`${env.ORIGIN}/`);
  await second.locator("article.assistant .markdown").first().waitFor();
  for (const [window, text] of [[page, "from the first window"], [second, "from the second window"]]) {
    await window.getByRole("textbox", { name: "Message" }).fill(text);
    await window.waitForTimeout(1500);
  }
  told.windows = await second.locator(".chat-title").allInnerTexts();
  told.trouble = await second.locator(".trouble").innerText();
  await second.locator(".chat-open").nth(0).click();
  await second.close();
  told.mine = await page.getByRole("textbox", { name: "Message" }).inputValue();
  told.errors = told.errors.filter((error) => !error.includes("409"));

  // The worker dies in mid-answer: another one resumes, and the place is marked
  await page.keyboard.press("Alt+n");
  await page.keyboard.press("Alt+,");
  await page.getByLabel("Longest answer").fill("300");
  await page.getByLabel("System prompt").fill("You are a storyteller.");
  await page.keyboard.press("Escape");
  await sent(page, STORY);
  await page.waitForFunction(() => [...document.querySelectorAll("article.assistant .markdown")].at(-1)?.innerText.length > 200);
  await ask("kill");
  const resumed = await ended(page);
  told.seam = { marks: await resumed.locator(".seam").count(), says: await resumed.locator(".resumed").allInnerTexts(), error: await resumed.locator(".failure").allInnerTexts() };
  await resumed.locator(".seam").first().scrollIntoViewIfNeeded().catch(() => undefined);
  await checked(page, "seam");
  await pictured(page, "seam-wide-light");
  await page.getByRole("button", { name: /What was verified/ }).last().click();
  told.parts = await page.locator(".parts li").count();
  await page.keyboard.press("Escape");

  // Files: text and a picture
  await page.keyboard.press("Alt+n");
  const picker = page.locator('.composer input[type="file"]');
  await picker.setInputFiles([{ name: "<img src=x onerror=alert(1)>.txt", mimeType: "text/plain", buffer: Buffer.from("The harbour is called Marisol.") }]);
  await page.locator(".composer .file").waitFor();
  await picker.setInputFiles([{ name: "bad.bin", mimeType: "application/octet-stream", buffer: Buffer.from([0, 1, 255]) }]);
  told.refusedFile = await page.locator(".toast").innerText();
  await sent(page, "What is the harbour called?");
  await ended(page);
  told.file = await page.locator("article.user .file-name").innerText();

  // Search, titles, export and import
  await page.keyboard.press("Control+k");
  await page.keyboard.type("lighthouse");
  await page.locator(".chat-around").first().waitFor();
  told.found = await page.locator(".chat-open").count();
  await page.getByRole("searchbox").fill("");
  await page.waitForFunction(() => document.querySelectorAll(".chat-open").length >= 3);
  await page.keyboard.press("Alt+,");
  await page.getByRole("heading", { name: "Settings" }).waitFor();
  await checked(page, "settings");
  await pictured(page, "settings-wide-light");
  const download = page.waitForEvent("download");
  await page.getByRole("button", { name: "Export all chats" }).click();
  const file = `${env.WORK}/export.json`;
  await (await download).saveAs(file);
  const exported = JSON.parse(readFileSync(file, "utf8"));
  told.exported = exported.chats.length;
  exported.chats = exported.chats.slice(0, 1).map((chat) => ({ ...chat, title: "Imported <b>chat</b>", named: true }));
  writeFileSync(file, JSON.stringify(exported));
  await page.locator('.settings input[type="file"]').setInputFiles(file);
  await page.locator(".chat-title").getByText("Imported <b>chat</b>").waitFor();
  told.imported = await page.locator(".proof").first().innerText();

  // History: encrypted, and found by the next proxy; dark from now on
  await page.keyboard.press("Alt+,");
  await page.getByRole("radio", { name: "Dark" }).check();
  await page.getByLabel("Passphrase").fill("four random words here");
  await page.getByRole("button", { name: "Keep chats; key from a passphrase" }).click();
  await page.locator(".settings").getByText("kept on this computer, encrypted").waitFor();
  await checked(page, "settings-dark");
  await pictured(page, "settings-wide-dark");
  await page.getByRole("button", { name: "Make a link" }).click();
  const link = await page.locator(".settings code.wrap").innerText();
  await page.keyboard.press("Escape");
  await page.locator(".chat-open").nth(2).click();
  await page.locator("article.assistant").first().waitFor();
  await checked(page, "answer-dark");
  await pictured(page, "answer-wide-dark");
  told.history = await ask("look at the history");

  // A phone
  const phone = await opened(browser, { viewport: { width: 390, height: 780 }, isMobile: true, hasTouch: true, deviceScaleFactor: 2, colorScheme: "light" });
  await phone.goto(link);
  await phone.locator("article.assistant").first().waitFor();
  await checked(phone, "phone");
  await pictured(phone, "answer-phone-light");
  told.overflow = await phone.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  await phone.getByRole("button", { name: "Chats", exact: true }).click();
  await phone.getByRole("button", { name: "New chat" }).waitFor();
  await checked(phone, "phone-list");
  await pictured(phone, "list-phone-light");
  await phone.getByRole("button", { name: "New chat" }).click();
  await phone.emulateMedia({ colorScheme: "dark" });
  await phone.getByRole("heading", { name: "What would you like to ask?" }).waitFor();
  await checked(phone, "phone-dark");
  await pictured(phone, "welcome-phone-dark");
  await phone.locator(".lock").click();
  await phone.locator(".check").first().waitFor();
  await checked(phone, "phone-proof-dark");
  await pictured(phone, "proof-phone-dark");
  await phone.context().close();

  // A proxy that has ended costs nothing that was typed
  await ask("stop the proxy");
  await page.keyboard.press("Alt+n");
  await sent(page, "typed while the proxy is away");
  const away = await ended(page);
  told.away = { question: await page.locator("article.user .bubble").innerText(), says: await away.locator(".failure").innerText() };
  await pictured(page, "failure-wide-dark");

  // The next proxy: the history is locked, and opens
  const next = await ask("start another proxy");
  env.ORIGIN = next.origin;
  const later = await opened(browser, { colorScheme: "dark" });
  await later.goto(next.page);
  await later.locator(".sidebar-note").getByText("locked").waitFor();
  await later.keyboard.press("Alt+,");
  await later.getByLabel("Passphrase").fill("not these words at all");
  await later.getByRole("button", { name: "Open the history" }).click();
  told.wrong = await later.locator("dialog .toast").innerText();
  await later.getByLabel("Passphrase").fill("four random words here");
  await later.getByRole("button", { name: "Open the history" }).click();
  await later.locator(".settings").getByText("kept on this computer, encrypted").waitFor();
  told.restored = await later.locator(".chat-open").count();
  await later.getByRole("button", { name: "Delete all chats" }).click();
  await later.getByRole("button", { name: "Delete everything" }).click();
  await later.locator(".settings").getByText("Nothing is on disk").waitFor();
  told.forgotten = { chats: await later.locator(".chat-open").count(), disk: await ask("look at the history") };
} finally {
  await browser.close();
}
console.log(JSON.stringify({ told }));
process.exit(0);
