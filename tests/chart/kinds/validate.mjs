// Holds objects of other projects' kinds against the schemas of their own APIs: node validate.mjs FOLDER < OBJECTS
// FOLDER has the packages. OBJECTS is a JSON list. What is wrong goes to stdout, a line each; the last line says how many objects were looked at.

import { existsSync } from "node:fs";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "cert-manager.io": "cert-manager",
  "external-secrets.io": "external-secrets",
  "gateway.networking.k8s.io": "gateway-api",
  "keda.sh": "keda",
  "monitoring.coreos.com": "prometheus-operator",
};

async function wrong(each) {
  const found = PACKAGES[each.apiVersion.split("/")[0]];
  if (found === undefined) return "no schema";
  const file = join(process.argv[2], "node_modules", "@kubernetes-models", found, each.apiVersion, `${each.kind}.js`);
  if (!existsSync(file)) return "no schema";
  const module = await import(pathToFileURL(file));
  try {
    new module[each.kind](each).validate();
  } catch (error) {
    return error.message.replaceAll("\n", " ");
  }
  return undefined;
}

const objects = JSON.parse(await text(process.stdin));
for (const each of objects) {
  const reason = await wrong(each);
  if (reason !== undefined) console.log(`${each.kind} ${each.metadata.name}: ${reason}`);
}
console.log(`looked at ${objects.length}`);
