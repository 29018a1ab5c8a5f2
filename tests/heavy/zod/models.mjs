// Schemas of the kinds that people write with zod 4.
import { z } from "zod";

const Address = z.object({ street: z.string().max(40), city: z.string().min(1).max(20), zip: z.string().regex(/^\d{4}-\d{3}$/) });
const Colour = z.enum(["red", "green", "blue"]);
const Cat = z.object({ kind: z.literal("cat"), lives: z.int().min(0).max(9) });
const Dog = z.object({ kind: z.literal("dog"), breed: z.string().max(20) });
const Node = z.object({ value: z.int(), get children() { return z.array(Node).max(2); } });
const Linked = z.object({ value: z.boolean(), get next() { return Linked.nullable(); } });
const Sum = z.object({ op: z.literal("sum"), get left() { return Expression; }, get right() { return Expression; } });
const Leaf = z.object({ op: z.literal("number"), value: z.number() });
const Expression = z.discriminatedUnion("op", [Leaf, Sum]);
const Json = z.json();

export const models = {
  Plain: z.object({ name: z.string(), age: z.int(), score: z.number(), happy: z.boolean() }),
  Described: z.object({ name: z.string().describe("Her name"), old: z.int().meta({ title: "Age", examples: [3] }) }),
  Identified: z.object({ home: Address.meta({ id: "Address" }), work: Address.meta({ id: "Address2", description: "Work" }) }),
  Integers: z.object({
    a: z.int().min(0).max(120), b: z.int().gt(-5).lt(5), c: z.int().positive(), d: z.int().nonnegative(), e: z.number().int(),
    f: z.int().multipleOf(5).min(10).max(100),
  }),
  Sized: z.object({ a: z.int32(), b: z.uint32(), c: z.float32(), d: z.float64() }),
  Floats: z.object({ a: z.number().min(0).max(1), b: z.number().gt(0.5).lt(2.5), c: z.number().positive(), d: z.number().multipleOf(0.5).min(0).max(9) }),
  Strings: z.object({ a: z.string().min(2).max(5), b: z.string().length(3), c: z.string().nonempty() }),
  Affixes: z.object({ a: z.string().startsWith("x-"), b: z.string().endsWith("z"), c: z.string().includes("a"), d: z.string().startsWith("a").endsWith("z").max(9) }),
  Cases: z.object({ a: z.string().lowercase(), b: z.string().uppercase(), c: z.string().toLowerCase() }),
  Patterns: z.object({
    a: z.string().regex(/^[A-Z]{3}-\d{4}$/), b: z.string().regex(/^(?=.*[A-Z])(?=.*\d)[A-Za-z\d]{8,12}$/), c: z.string().regex(/^a+$|^b+$/),
  }),
  Templates: z.object({ a: z.templateLiteral(["id-", z.int().min(0).max(9)]), b: z.templateLiteral([z.enum(["x", "y"]), "/", z.literal(3)]) }),
  Email: z.object({ email: z.email() }),
  Emails: z.object({ a: z.email({ pattern: z.regexes.html5Email }), b: z.email({ pattern: z.regexes.unicodeEmail }), c: z.email().max(40) }),
  Links: z.object({ a: z.url(), b: z.url().nullable() }),
  Http: z.object({ a: z.httpUrl() }),
  Ids: z.object({ a: z.uuid(), b: z.uuidv4(), c: z.uuidv7(), d: z.guid() }),
  Tokens: z.object({ a: z.nanoid(), b: z.cuid2(), c: z.ulid(), d: z.xid(), e: z.ksuid() }),
  Dates: z.object({ day: z.iso.date(), at: z.iso.datetime(), time: z.iso.time() }),
  Moments: z.object({ a: z.iso.datetime({ offset: true }), b: z.iso.datetime({ precision: 3 }), c: z.iso.datetime({ local: true }) }),
  Duration: z.object({ took: z.iso.duration() }),
  Network: z.object({ v4: z.ipv4(), v6: z.ipv6(), net: z.cidrv4() }),
  Encoded: z.object({ a: z.base64(), b: z.base64url(), c: z.hex() }),
  Odd: z.object({ phone: z.e164(), host: z.hostname(), face: z.emoji() }),
  Enums: z.object({ colour: Colour, maybe: Colour.nullable() }),
  Literals: z.object({ a: z.literal("only"), b: z.literal(["x", "y"]), c: z.literal(3), d: z.literal([1, "two", null, true]) }),
  Unions: z.object({ a: z.union([z.int(), z.string()]), b: z.union([Address, Cat]), c: z.union([z.array(z.int()), z.null()]) }),
  Nullables: z.object({ a: z.string().nullable(), b: z.int().nullable(), c: Address.nullable(), d: z.array(z.string()).nullable() }),
  Nested: z.object({ home: Address, others: z.array(Address).max(2) }),
  Tuples: z.object({ pair: z.tuple([z.int(), z.string()]), point: z.tuple([z.number(), z.number(), z.number()]), rest: z.tuple([z.string()], z.int()) }),
  Lists: z.object({ a: z.array(z.string()).min(1).max(3), b: z.array(z.int()).length(2), c: z.array(z.array(z.int())).max(2) }),
  Records: z.object({ counts: z.record(z.string(), z.int()), nested: z.record(z.string(), Address) }),
  Keyed: z.object({ by: z.record(Colour, z.number()), partial: z.partialRecord(Colour, z.int()) }),
  Pets: z.object({ pet: z.discriminatedUnion("kind", [Cat, Dog]), others: z.array(z.discriminatedUnion("kind", [Cat, Dog])).max(2) }),
  Tree: Node,
  Linked,
  Expression: z.object({ root: Expression }),
  Any: z.object({ a: z.any(), b: z.unknown() }),
  Document: z.object({ body: Json }),
  Strict: z.strictObject({ a: z.int(), b: z.string() }),
  Loose: z.looseObject({ a: z.int() }),
  Extended: Cat.extend({ name: z.string() }).omit({ lives: true }),
  Intersected: z.object({ both: z.intersection(z.object({ a: z.int() }), z.object({ b: z.string() })) }),
  Quoted: z.object({ 'odd "name" /~': z.literal('a "quoted" \\ é\n') }),
  Readonly: z.object({ a: z.string().readonly(), b: z.string().brand() }),
  Never: z.object({ none: z.array(z.never()) }),
  Booleans: z.object({ a: z.boolean(), b: z.literal(true), c: z.null() }),
};
// Those that openai's strict form does not take, as it says itself: a property that may be left out has to be nullable.
export const optional = {
  Optionals: z.object({ a: z.string().optional(), b: z.int().default(3), c: Address.partial(), d: z.string().nullish() }),
  Catch: z.object({ a: z.string().catch("x"), b: z.int().prefault(3) }),
};
