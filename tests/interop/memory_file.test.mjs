/** The folder of remembered manifests is this user's alone, and holds nothing that a crash left. */

import { deepStrictEqual as same, ok, rejects } from "node:assert";
import { chmod, chown, mkdtemp, readdir, rm, stat, utimes, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { ConfigurationError } from "../../sdk/javascript/src/errors.js";
import { FileMemory } from "../../sdk/javascript/src/trust/memory_file.js";

async function folderOf(t) {
  const folder = await mkdtemp(join(tmpdir(), "lacre-memory-"));
  t.after(() => rm(folder, { recursive: true, force: true }));
  return folder;
}

async function refused(folder, remedy) {
  for (const use of [(memory) => memory.read(), (memory) => memory.replace(0, "x")]) {
    await rejects(use(new FileMemory(folder)), (error) => error instanceof ConfigurationError && remedy.test(error.message));
  }
}

test("a folder that others may enter is refused", async (t) => {
  const folder = await folderOf(t);
  for (const mode of [0o755, 0o770, 0o707, 0o710]) {
    await chmod(folder, mode);
    await refused(folder, /chmod 700/);
  }
  await chmod(folder, 0o700);
  const memory = new FileMemory(folder);
  same([await memory.read(), await memory.replace(0, "x")], [{ generation: 0, text: null }, true]);
  same(await memory.read(), { generation: 1, text: "x" });
});

test("a folder of another user is refused", async (t) => {
  let folder = "/";
  if (process.getuid() === 0) {
    folder = await folderOf(t);
    await chown(folder, 12345, 12345);
  }
  await refused(folder, /of this user/);
  ok(!(await readdir(folder)).some((name) => name.startsWith("seen.")));
});

test("what a crash left is removed, and what is being written is not", async (t) => {
  const folder = await folderOf(t);
  const [left, written, other] = [".0123456789abcdef", ".fedcba9876543210", ".profile"];
  for (const name of [left, written, other]) await writeFile(join(folder, name), "");
  const before = Date.now() / 1000 - 7200;
  for (const name of [left, other]) await utimes(join(folder, name), before, before);
  ok(await new FileMemory(folder).replace(0, "x"));
  same((await readdir(folder)).sort(), [written, other, "seen.1.json"].sort());
});

test("a file that cannot be written whole is removed", async (t) => {
  const folder = await folderOf(t);
  await rejects(new FileMemory(folder).replace(0, 7), ConfigurationError); // as a full disk: the write itself fails
  same(await readdir(folder), []);
  same((await stat(folder)).mode & 0o777, 0o700);
});
